# Decides whether the CUDA kernels are compiled, says what it chose, and adds them to _C.
# Sets cuda_compiled, cuda_archs and cuda_version for module.cpp.
file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/cuda/*.cpp)

set(use_cuda ${EMBATTLE_CUDA})
if(EMBATTLE_CUDA STREQUAL "AUTO")
  find_program(nvcc_program nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin)
  # A CPU-only torch is no reason against them: one library serves both kinds of torch.
  if(nvcc_program AND cuda_sources)
    set(use_cuda ON)
    message(STATUS "CUDA kernels: on (found ${nvcc_program})")
  else()
    set(use_cuda OFF)
    message(STATUS "CUDA kernels: off (no nvcc found; the CPU kernels are built; "
                   "EMBATTLE_CUDA=ON insists)")
  endif()
endif()
if(NOT use_cuda OR NOT cuda_sources)
  return()
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "80-real;90-real;100")
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)

add_library(embattle_cuda OBJECT ${cuda_sources})
target_link_libraries(embattle_cuda PRIVATE embattle_torch CUDA::cudart_static)
target_compile_options(embattle_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra -Werror=all-warnings -Xptxas=-v>
  $<$<COMPILE_LANGUAGE:CXX>:${strict_flags}>)
# What ptxas reports is kept beside each object, for `make cuda-check`.
set_property(TARGET embattle_cuda PROPERTY CUDA_COMPILER_LAUNCHER
  sh "${CMAKE_CURRENT_SOURCE_DIR}/cmake/keep_ptxas_report.sh" ${CMAKE_CUDA_COMPILER_LAUNCHER})
target_sources(_C PRIVATE $<TARGET_OBJECTS:embattle_cuda>)
target_link_libraries(_C PRIVATE CUDA::cudart_static ${CMAKE_DL_LIBS} rt pthread)

set(cuda_compiled 1)
string(REPLACE ";" "," cuda_archs "${CMAKE_CUDA_ARCHITECTURES}")
set(cuda_version "${CMAKE_CUDA_COMPILER_VERSION}")
