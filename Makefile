# Nibble's front door. `make demo` on a fresh machine: installs what is missing, builds, answers a
# question with the bundled model. JOBS=N limits the compilers that run at a time.
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
WERROR ?= OFF
FUZZ_SECONDS ?= 600

.PHONY: help setup build dist demo test test-asan quality fuzz format lint clean

help:
	@echo "make demo       set up, build, ask the bundled model a question"
	@echo "make setup      install the packages that are missing (apt or brew)"
	@echo "make build      build build/release/nibble"
	@echo "make dist       build build/dist/nibble for all NVIDIA GPUs from compute capability 8.0 on"
	@echo "make test       set up, build, run all tests"
	@echo "make quality    only the slow tests: what models predict, against llama.cpp's numbers"
	@echo "make test-asan  the tests under the address and undefined-behaviour sanitizers"
	@echo "make fuzz       FUZZ_SECONDS=$(FUZZ_SECONDS) of fuzzing per target (needs clang)"
	@echo "make format     clang-format all sources"
	@echo "make lint       check format and the direction of includes"

setup:
	@tools/setup.sh build

build:
	@cmake --preset release -DNIBBLE_WERROR=$(WERROR) > /dev/null
	@cmake --build --preset release --target nibble -j $(JOBS)

dist:
	@cmake --preset dist -DNIBBLE_WERROR=$(WERROR)
	@cmake --build --preset dist --target nibble -j $(JOBS)

demo: setup build
	build/release/nibble run -p 'What does "harbour" mean?' --seed 7

test: setup
	@cmake --preset release -DNIBBLE_WERROR=$(WERROR) > /dev/null
	@cmake --build --preset release -j $(JOBS)
	ctest --preset release -j $(JOBS)

quality: setup
	@cmake --preset release -DNIBBLE_WERROR=$(WERROR) > /dev/null
	@cmake --build --preset release -j $(JOBS)
	ctest --preset release -L quality --verbose

test-asan: setup
	@cmake --preset asan-ubsan -DNIBBLE_WERROR=$(WERROR) > /dev/null
	@cmake --build --preset asan-ubsan -j $(JOBS)
	ctest --preset asan-ubsan -j $(JOBS)

fuzz:
	@tools/setup.sh build fuzz
	fuzz/run.sh $(FUZZ_SECONDS)

format:
	@tools/setup.sh lint
	git ls-files '*.h' '*.cc' '*.cu' '*.cuh' | xargs clang-format -i

lint:
	@tools/setup.sh lint
	git ls-files '*.h' '*.cc' '*.cu' '*.cuh' | xargs clang-format --dry-run -Werror
	python3 tools/check_includes.py

clean:
	rm -rf build
