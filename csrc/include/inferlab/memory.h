// What the system is told about memory.
#pragma once

#include <cstdint>

namespace inferlab::cpu {

// Asks for large pages (2 MiB on Linux) for the whole ones inside [data, data + bytes), before they
// are first written. False: the system has none to give; the memory is as it was.
bool advise_large_pages(void* data, int64_t bytes);

// Gives back the whole pages inside [data, data + bytes): what was written there is lost. A page of
// a mapped file is read again when it is looked at, another one holds zeros. False: nothing was
// done.
bool discard_pages(void* data, int64_t bytes);

}  // namespace inferlab::cpu
