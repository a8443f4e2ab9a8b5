# Looks for a C++20 compiler before CMake insists on one, so that its absence is told in one sentence.
include(CheckLanguage)
check_language(CXX)
if(NOT CMAKE_CXX_COMPILER)
  set(HEADWAY_ERROR "no working C++ compiler was found. Install one (Debian, Ubuntu: apt-get install g++; Fedora: \
dnf install gcc-c++; macOS: xcode-select --install) or name yours: CXX=/path/to/c++ pip install .")
endif()

macro(headway_check_cxx_version)
  foreach(known IN ITEMS "GNU 11" "Clang 14" "AppleClang 15")
    separate_arguments(known)
    list(GET known 0 compiler)
    list(GET known 1 oldest)
    if(CMAKE_CXX_COMPILER_ID STREQUAL compiler AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS oldest)
      set(HEADWAY_ERROR "${CMAKE_CXX_COMPILER} is ${compiler} ${CMAKE_CXX_COMPILER_VERSION}, and C++20 needs ${oldest} \
or newer. Install it, then name it: CXX=/path/to/c++ pip install .")
    endif()
  endforeach()
endmacro()
