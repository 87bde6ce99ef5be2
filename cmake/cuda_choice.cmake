# Whether the CUDA kernels are compiled, and for what. Run by itself it says what it would choose:
#
#   cmake -DEMBATTLE_CUDA=AUTO [-DNVCC=path] [-DDRIVER_SIGNS=files] -P cmake/cuda_choice.cmake

# What a machine with a GPU, or at least its driver, has: of the kernel, of Windows' subsystem, and
# of the user's side.
set(EMBATTLE_DRIVER_SIGNS
  /proc/driver/nvidia/version /dev/nvidiactl /dev/dxg
  /usr/lib/x86_64-linux-gnu/libcuda.so.1 /usr/lib/aarch64-linux-gnu/libcuda.so.1
  /usr/lib64/libcuda.so.1 /usr/lib/wsl/lib/libcuda.so.1)

# Code for compute capability 8.0 and 9.0, as far as nvcc knows them, and PTX of 10.0 (9.0 before CUDA
# 12.8), from which drivers translate, once, for what is newer: a megabyte for each architecture more.
# `codes`: what `nvcc --list-gpu-code` says. Empty where it knows none of them.
function(embattle_architectures codes result)
  set(chosen "")
  set(last 0)
  foreach(architecture 80 90 100)
    if("${codes}" MATCHES "sm_${architecture}([^0-9a-z]|$)")
      list(APPEND chosen "${architecture}-real")
      set(last ${architecture})
    endif()
  endforeach()
  if(last EQUAL 100)
    list(TRANSFORM chosen REPLACE "^100-real$" "100-virtual")
  else()
    list(TRANSFORM chosen REPLACE "^${last}-real$" "${last}") # code and PTX
  endif()
  set(${result} "${chosen}" PARENT_SCOPE)
endfunction()

# Sets ${use} to ON or OFF, ${architectures}, and ${why} to what a user is told. `nvcc`: its path, or
# something false.
function(embattle_choose_cuda wanted nvcc signs use architectures why)
  set(${use} OFF PARENT_SCOPE)
  set(${architectures} "" PARENT_SCOPE)
  if("${wanted}" STREQUAL "OFF")
    set(${why} "off (EMBATTLE_CUDA=OFF)" PARENT_SCOPE)
    return()
  endif()
  set(insists "the CPU kernels are built; EMBATTLE_CUDA=ON insists")
  if(NOT nvcc)
    set(${why} "off (no nvcc found; ${insists})" PARENT_SCOPE)
    return()
  endif()
  set(seen "")
  foreach(sign IN LISTS signs)
    if(EXISTS "${sign}")
      set(seen "${sign}")
      break()
    endif()
  endforeach()
  if("${wanted}" STREQUAL "AUTO" AND NOT seen)
    set(${why} "off (found ${nvcc}, but neither a GPU nor its driver; ${insists})" PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND "${nvcc}" --version
    OUTPUT_VARIABLE version ERROR_VARIABLE ignored RESULT_VARIABLE failed)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" version "${version}")
  set(version "${CMAKE_MATCH_1}")
  execute_process(COMMAND "${nvcc}" --list-gpu-code
    OUTPUT_VARIABLE codes ERROR_VARIABLE ignored RESULT_VARIABLE unlisted)
  embattle_architectures("${codes}" chosen)
  if(failed OR unlisted OR NOT version OR NOT chosen)
    set(${why} "off (${nvcc} does not say what it compiles for; ${insists})" PARENT_SCOPE)
    return()
  endif()
  if(version VERSION_LESS 12.4)
    set(${why} "off (${nvcc} is of CUDA ${version}; 12.4 or newer is needed; ${insists})"
      PARENT_SCOPE)
    return()
  endif()
  set(${use} ON PARENT_SCOPE)
  set(${architectures} "${chosen}" PARENT_SCOPE)
  set(${why} "on (${nvcc} of CUDA ${version})" PARENT_SCOPE)
endfunction()

if(CMAKE_SCRIPT_MODE_FILE STREQUAL CMAKE_CURRENT_LIST_FILE)
  if(NOT DEFINED DRIVER_SIGNS)
    set(DRIVER_SIGNS "${EMBATTLE_DRIVER_SIGNS}")
  endif()
  embattle_choose_cuda("${EMBATTLE_CUDA}" "${NVCC}" "${DRIVER_SIGNS}" use architectures why)
  execute_process(COMMAND "${CMAKE_COMMAND}" -E echo "${use}|${architectures}|${why}")
endif()
