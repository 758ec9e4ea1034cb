// The compiled library's namespace, and what it says about itself. Every op's schema stands beside
// its CPU kernel, in csrc/cpu/<op>.cpp, as a STABLE_TORCH_LIBRARY_FRAGMENT.
#include <torch/csrc/stable/library.h>

#include <string>

#include "build_info.h"  // written by fastdit/_build for each build

namespace fastdit {

// The JSON behind this marker tells what the file is without loading it: fastdit/_build reads it.
__attribute__((used)) extern const char kBuildInfo[] = "fastdit-build-info:" FASTDIT_BUILD_INFO;

std::string build_info() { return kBuildInfo + sizeof("fastdit-build-info:") - 1; }

}  // namespace fastdit

STABLE_TORCH_LIBRARY(fastdit_native, m) { m.def("build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(fastdit_native, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&fastdit::build_info));
}
