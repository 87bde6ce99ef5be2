# Decides whether the CUDA kernels are compiled, says what it chose, and adds them to _C.
# Sets cuda_compiled, cuda_archs and cuda_version for module.cpp.
include(cmake/cuda_choice.cmake)
file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/cuda/*.cpp)

# A CPU-only torch is no reason against them: one library serves both kinds of torch.
find_program(nvcc_program nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin)
embattle_choose_cuda("${EMBATTLE_CUDA}" "${nvcc_program}" "${EMBATTLE_DRIVER_SIGNS}"
  use_cuda architectures why)
if(EMBATTLE_CUDA AND NOT EMBATTLE_CUDA STREQUAL "AUTO" AND NOT use_cuda)
  string(REPLACE "; the CPU kernels are built; EMBATTLE_CUDA=ON insists" "" why "${why}")
  message(FATAL_ERROR "EMBATTLE_CUDA=${EMBATTLE_CUDA} asks for the CUDA kernels, which would be "
    "${why}. Put nvcc of CUDA 12.4 or newer on the PATH or into CUDA_HOME, or build with "
    "EMBATTLE_CUDA=OFF.")
endif()
if(use_cuda AND NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "${architectures}")
endif()
if(use_cuda AND EMBATTLE_CUDA STREQUAL "AUTO")
  # What nobody asked for must not break the build: a compiler that nvcc does not take, half a toolkit.
  include(CheckLanguage)
  check_language(CUDA)
  find_package(CUDAToolkit QUIET)
  find_path(cub_headers cub/device/device_radix_sort.cuh
    HINTS ${CUDAToolkit_INCLUDE_DIRS} PATH_SUFFIXES cccl)
  if(NOT CMAKE_CUDA_COMPILER OR NOT TARGET CUDA::cudart_static OR NOT cub_headers)
    set(use_cuda OFF)
    set(why "off (${nvcc_program} does not compile here; EMBATTLE_CUDA=ON shows why)")
  endif()
endif()
message(STATUS "CUDA kernels: ${why}")
if(NOT use_cuda)
  return()
endif()
message(STATUS "CUDA kernels for: ${CMAKE_CUDA_ARCHITECTURES}")

enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden) # as for C++

add_library(embattle_cuda OBJECT ${cuda_sources})
target_link_libraries(embattle_cuda PRIVATE embattle_torch CUDA::cudart_static)
target_compile_options(embattle_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra -Werror=all-warnings -Xptxas=-v>
  $<$<COMPILE_LANGUAGE:CXX>:${strict_flags}>)
# Code takes a seventh of its size. Every driver that runs what nvcc 13 makes unpacks this; what nvcc
# 12 makes runs on drivers of before 12.4 too, which know the older packing alone.
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13)
  set(packed --compress-mode=size)
else()
  set(packed -Xfatbin=-compress-all)
endif()
target_compile_options(embattle_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${packed}>)
# What ptxas reports is kept beside each object, for `make cuda-check`.
set_property(TARGET embattle_cuda PROPERTY CUDA_COMPILER_LAUNCHER
  sh "${CMAKE_CURRENT_SOURCE_DIR}/cmake/keep_ptxas_report.sh" ${CMAKE_CUDA_COMPILER_LAUNCHER})
target_sources(_C PRIVATE $<TARGET_OBJECTS:embattle_cuda>)
target_link_libraries(_C PRIVATE CUDA::cudart_static ${CMAKE_DL_LIBS} rt pthread)

set(cuda_compiled 1)
string(REPLACE ";" "," cuda_archs "${CMAKE_CUDA_ARCHITECTURES}")
set(cuda_version "${CMAKE_CUDA_COMPILER_VERSION}")
