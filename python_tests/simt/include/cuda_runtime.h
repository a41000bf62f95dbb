// What kernel sources get in place of CUDA's header of this name.
#pragma once

#include "simt/cuda.h"
