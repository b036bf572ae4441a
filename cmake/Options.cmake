# The build's options, and the one decision that depends on the machine: is there an nvcc?

set(INFERLAB_CUDA "AUTO" CACHE STRING "Build the CUDA kernels: AUTO (where nvcc is found), ON, OFF")
set_property(CACHE INFERLAB_CUDA PROPERTY STRINGS AUTO ON OFF)
set(INFERLAB_CUDA_ARCHITECTURES "80;90" CACHE STRING
    "CUDA architectures to compile for, e.g. \"80;86;89;90;100;120\"; PTX of the last is added")
option(INFERLAB_CUDA_WERROR "CUDA warnings, register spills and local memory are errors" OFF)

if(NOT INFERLAB_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "INFERLAB_CUDA is '${INFERLAB_CUDA}'; it must be AUTO, ON or OFF.")
endif()

set(INFERLAB_HAVE_CUDA OFF)
if(NOT INFERLAB_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(INFERLAB_HAVE_CUDA ON)
  elseif(INFERLAB_CUDA STREQUAL "ON")
    message(FATAL_ERROR
      "INFERLAB_CUDA=ON, but no nvcc was found. Install the CUDA toolkit, put nvcc on PATH or set "
      "CUDACXX to it; or build with -DINFERLAB_CUDA=AUTO (CPU only where there is no nvcc).")
  endif()
endif()
message(STATUS "inferlab: CUDA kernels ${INFERLAB_HAVE_CUDA} (INFERLAB_CUDA=${INFERLAB_CUDA})")

# Warnings and hidden symbols for our own targets. Contraction is off everywhere: the noise must be
# the same bits on every backend, so a fused multiply-add is written where it is meant.
function(inferlab_strict target)
  set_target_properties(${target} PROPERTIES
    POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-O3;-ffp-contract=off;-fno-math-errno>)
endfunction()
