# Finds the interpreter, its headers and pybind11 (pip puts it in the build environment; otherwise the interpreter's).
set(HEADWAY_OLDEST_PYBIND11 2.13)
find_package(Python 3.11 QUIET COMPONENTS Interpreter Development.Module)
if(NOT Python_FOUND)
  set(HEADWAY_ERROR "no Python 3.11 or newer with its C headers was found (Debian, Ubuntu: apt-get install python3-dev), \
or name the interpreter: cmake -DPython_EXECUTABLE=/path/to/python3")
  return()
endif()
if(NOT pybind11_DIR)
  execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
    OUTPUT_VARIABLE pybind11_HINT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
find_package(pybind11 CONFIG QUIET HINTS "${pybind11_HINT}")
if(NOT pybind11_FOUND)
  set(HEADWAY_ERROR "pybind11 is not installed for ${Python_EXECUTABLE}. Install it: ${Python_EXECUTABLE} -m pip install \
'pybind11>=${HEADWAY_OLDEST_PYBIND11}' scikit-build-core, or let pip fetch it: pip install . (no --no-build-isolation)")
elseif(pybind11_VERSION VERSION_LESS HEADWAY_OLDEST_PYBIND11)
  set(HEADWAY_ERROR "pybind11 ${pybind11_VERSION} is older than ${HEADWAY_OLDEST_PYBIND11}. Update it: \
${Python_EXECUTABLE} -m pip install 'pybind11>=${HEADWAY_OLDEST_PYBIND11}'")
endif()
