# nibble_room(NAME DEPENDS a b LIBRARIES fmt::fmt)
#
# One room of src/: every .cc below the folder becomes the static library nibble_NAME, every *_test.cc one
# test binary nibble_NAME_test. DEPENDS names the lower rooms that this one may include.
function(nibble_room name)
  cmake_parse_arguments(ROOM "" "" "DEPENDS;LIBRARIES" ${ARGN})
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/*.cc)
  set(tests ${sources})
  list(FILTER sources EXCLUDE REGEX "_test\\.cc$")
  list(FILTER tests INCLUDE REGEX "_test\\.cc$")
  list(TRANSFORM ROOM_DEPENDS PREPEND nibble_)

  add_library(nibble_${name} STATIC ${sources})
  target_link_libraries(nibble_${name} PUBLIC nibble_options ${ROOM_DEPENDS} ${ROOM_LIBRARIES})
  if(tests)
    nibble_test(nibble_${name}_test SOURCES ${tests} LIBRARIES nibble_${name})
  endif()
endfunction()

# nibble_test(NAME SOURCES ... LIBRARIES ... LABEL slow): a GoogleTest binary whose cases CTest runs one
# by one; `ctest -L slow` chooses them.
function(nibble_test name)
  cmake_parse_arguments(TEST "" "LABEL" "SOURCES;LIBRARIES" ${ARGN})
  add_executable(${name} ${TEST_SOURCES})
  target_link_libraries(${name} PRIVATE nibble_test_support ${TEST_LIBRARIES} GTest::gtest_main)
  gtest_discover_tests(${name} DISCOVERY_MODE PRE_TEST PROPERTIES TIMEOUT 600 LABELS "${TEST_LABEL}")
endfunction()
