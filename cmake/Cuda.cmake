# The CUDA kernels as one static library with the CUDA runtime inside, so that the module loads on
# a machine without a driver.
set(last_arch "")
set(real_archs "")
foreach(arch IN LISTS INFERLAB_CUDA_ARCHITECTURES)
  list(APPEND real_archs ${arch}-real)
  set(last_arch ${arch})
endforeach()
list(APPEND real_archs ${last_arch}-virtual)
set(CMAKE_CUDA_ARCHITECTURES ${real_archs})
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
add_library(inferlab_cuda STATIC ${cuda_sources})
target_include_directories(inferlab_cuda PUBLIC csrc/include)
target_compile_features(inferlab_cuda PUBLIC cxx_std_17 cuda_std_17)
set_target_properties(inferlab_cuda PROPERTIES
  CUDA_ARCHITECTURES "${real_archs}" POSITION_INDEPENDENT_CODE ON CUDA_RUNTIME_LIBRARY Static
  CXX_VISIBILITY_PRESET hidden CUDA_VISIBILITY_PRESET hidden)
target_compile_options(inferlab_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:-O3;--fmad=false;-Xcompiler=-Wall>)
target_link_libraries(inferlab_cuda PUBLIC CUDA::cudart_static)
target_compile_definitions(inferlab_cuda PUBLIC INFERLAB_WITH_CUDA=1)
list(JOIN INFERLAB_CUDA_ARCHITECTURES "," arch_names)
target_compile_definitions(_C PRIVATE INFERLAB_CUDA_ARCHS="${arch_names}"
  INFERLAB_CUDA_VERSION="${CUDAToolkit_VERSION}")

# Register spills and local memory are errors, but in files that are named here with the reason.
set(may_use_local_memory)
if(INFERLAB_CUDA_WERROR)
  target_compile_options(inferlab_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
  foreach(source IN LISTS cuda_sources)
    get_filename_component(name ${source} NAME)
    if(NOT name IN_LIST may_use_local_memory)
      set_property(SOURCE ${source} APPEND PROPERTY COMPILE_OPTIONS
        -Xptxas=-warn-spills -Xptxas=-warn-lmem-usage -Xptxas=-Werror)
    endif()
  endforeach()
endif()
