# Flags common to every target: C++20, warnings, sanitizers.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)

add_library(nibble_options INTERFACE)
target_include_directories(nibble_options INTERFACE ${PROJECT_SOURCE_DIR}/src)
target_compile_options(nibble_options INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>
  # Kernels state their own fused multiply-adds; the references must not gain any.
  $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off>)
if(NIBBLE_WERROR)
  target_compile_options(nibble_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()
if(NIBBLE_SANITIZE)
  add_compile_options(-fsanitize=${NIBBLE_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  add_link_options(-fsanitize=${NIBBLE_SANITIZE})
endif()
if(NIBBLE_FUZZ)
  # Coverage of the whole code for libFuzzer; its main() is linked in fuzz/ alone.
  add_compile_options(-fsanitize=fuzzer-no-link)
endif()
