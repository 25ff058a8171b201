#!/bin/sh
# Installs what is missing for: build (and its tests), fuzz, lint. Asks nothing.
# usage: tools/setup.sh build|fuzz|lint ...
set -eu

missing=
need() {  # need PACKAGE TEST...: the package is missing unless the test succeeds
  package=$1
  shift
  "$@" > /dev/null 2>&1 || missing="$missing $package"
}
has_header() { echo "#include <$1>" | "${CXX:-c++}" -std=c++20 -fsyntax-only -x c++ -; }
newer_cmake() {  # presets and Boost's packages need 3.25
  version=$(cmake --version | sed -n 's/^cmake version //p')
  printf '3.25\n%s\n' "$version" | sort -C -t. -k1,1n -k2,2n
}
has_fuzzer() {
  echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' |
    clang++ -fsanitize=fuzzer -x c++ - -o /dev/null
}
installed() { dpkg-query -W -f '${Status}' "$1" | grep -q 'ok installed'; }

boost_json() {  # the newest packaged Boost.JSON
  apt-cache pkgnames libboost-json1. | grep -E '^libboost-json1\.[0-9]+-dev$' | sort -V | tail -1
}

if [ "$(uname)" = Darwin ]; then
  command -v brew > /dev/null || { echo "setup: install Homebrew first" >&2; exit 1; }
  for package in cmake ninja cli11 fmt boost googletest xxhash python3; do
    need $package brew list $package
  done
  for purpose in "$@"; do
    [ "$purpose" != lint ] || need clang-format command -v clang-format
    [ "$purpose" != fuzz ] || need llvm brew list llvm
  done
  [ -z "$missing" ] || brew install $missing
  exit 0
fi

command -v apt-get > /dev/null || {
  echo "setup: neither apt-get nor brew here; install a C++20 compiler, CMake 3.25, Ninja, CLI11," \
    "fmt, Boost.JSON, libedit, xxHash and GoogleTest yourself" >&2
  exit 0
}
for purpose in "$@"; do
  case $purpose in
    build)
      for package in g++ ninja-build libcli11-dev libfmt-dev libedit-dev libgtest-dev \
          libxxhash-dev; do
        need $package installed $package
      done
      need cmake newer_cmake
      need python3 command -v python3
      need libboost-json has_header boost/json.hpp
      ;;
    fuzz)
      need clang command -v clang++
      need libclang-rt-dev has_fuzzer
      ;;
    lint)
      need clang-format command -v clang-format
      need python3 command -v python3
      ;;
    *) echo "setup: what is $purpose?" >&2; exit 2 ;;
  esac
done
[ -n "$missing" ] || exit 0

as_root=
[ "$(id -u)" = 0 ] || as_root=sudo
export DEBIAN_FRONTEND=noninteractive
echo "setup: installing$missing" >&2
$as_root apt-get update -q
case $missing in
  *libboost-json*) missing=$(echo "$missing" | sed "s/libboost-json/$(boost_json)/") ;;
esac
$as_root apt-get install -q -y --no-install-recommends $missing
