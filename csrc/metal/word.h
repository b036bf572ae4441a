// What ops that only move memory move at a time (INFERLAB_WORD, in bytes): 16 where every address
// and size is a multiple of it, else 2.
#pragma once

#include "inferlab/portable.h"

using namespace metal;
using namespace inferlab;

#if INFERLAB_WORD == 16
typedef uint4 Word;
#else
typedef ushort Word;
#endif

inline long words_in(long bytes) { return bytes / long(sizeof(Word)); }
