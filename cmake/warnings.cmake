# headway_warnings(target): the project's warnings, errors in CI alone: what a user's compiler thinks of must not keep
# him from building.
function(headway_warnings target)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -Wno-unknown-pragmas>)
  if(HEADWAY_WARNINGS_ARE_ERRORS)
    target_compile_options(${target} PRIVATE
      $<$<COMPILE_LANGUAGE:CXX>:-Werror> $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
  endif()
  if(HEADWAY_SANITIZE)
    target_compile_options(${target} PRIVATE -fsanitize=${HEADWAY_SANITIZE} -fno-sanitize-recover=all -g)
    target_link_options(${target} PRIVATE -fsanitize=${HEADWAY_SANITIZE})
  endif()
endfunction()

# headway_module(name sources...): one Python module, next to the package when built in place, installed otherwise.
function(headway_module name)
  pybind11_add_module(${name} MODULE ${ARGN})
  headway_warnings(${name})
  install(TARGETS ${name} DESTINATION headway)
endfunction()
