# CUDA where nvcc is found; everything else works without. NIBBLE_CUDA=OFF leaves it out.
# Sets NIBBLE_HAS_CUDA. (CMAKE_CUDA_COMPILER does not say: it stays in the cache.)
set(NIBBLE_HAS_CUDA OFF)
option(NIBBLE_CUDA "Build the CUDA backend when nvcc is found" ON)
set(NIBBLE_CUDA_ARCHITECTURES "" CACHE STRING
  "CUDA architectures, as CMAKE_CUDA_ARCHITECTURES takes them; empty: this machine's GPU, else 90a")

# Sanitizers and fuzzers see the host only, and nvcc takes none of their flags.
if(NOT NIBBLE_CUDA OR NIBBLE_SANITIZE OR NIBBLE_FUZZ)
  return()
endif()

include(CheckLanguage)
find_program(CMAKE_CUDA_COMPILER nvcc HINTS /usr/local/cuda/bin)
if(NOT CMAKE_CUDA_COMPILER)
  unset(CMAKE_CUDA_COMPILER CACHE)
  message(STATUS "nvcc not found: no CUDA backend")
  return()
endif()
if(NOT NIBBLE_CUDA_ARCHITECTURES)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE capability OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
  set(NIBBLE_CUDA_ARCHITECTURES 90a)
  if(NOT failed AND capability)
    string(REGEX REPLACE "\n.*" "" capability "${capability}")
    string(REPLACE "." "" NIBBLE_CUDA_ARCHITECTURES "${capability}")
  endif()
endif()
# Code for these devices alone, none for those to come, unless "-virtual" asks for it. 9.0's own
# instructions (asynchronous matrix products) have a name of their own.
list(TRANSFORM NIBBLE_CUDA_ARCHITECTURES REPLACE "^90$" "90a" OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
list(TRANSFORM CMAKE_CUDA_ARCHITECTURES APPEND "-real" REGEX "^[0-9]+[a-z]?$")
# The runtime is linked statically; it loads the driver when it is first used, if there is one.
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
set(NIBBLE_HAS_CUDA ON)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know that nvcc has C++20
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
