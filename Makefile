# Needs python3 (3.11 or later), a C++ compiler and make. The environments are made on first use and kept until one
# of the files that they depend on changes.

PYTHON := python3
PY := .venv/bin/python
PIP := -m pip --disable-pip-version-check install --quiet
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: help demo demo-seeds demo-losses demo-methods experiments test test-aot test-floor mutants bench bench-compare gpu clean
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: .venv/.examples .venv/.fastcl ## train SimCLR on digits, check the linear probe, write results/demo/report.html
	$(PY) examples/demo.py --out results/demo

demo-seeds: .venv/.examples .venv/.fastcl ## the demo with three seeds, and the mean of their linear probes
	$(PY) examples/demo.py --out results/demo-seeds --seeds 0 1 2

demo-losses: .venv/.examples .venv/.fastcl ## the demo with every loss, side by side in results/demo-losses/losses.md
	$(PY) examples/demo.py --out results/demo-losses --losses

demo-methods: .venv/.examples .venv/.fastcl ## the demo with every method, side by side in results/demo-methods/methods.md
	$(PY) examples/demo.py --out results/demo-methods --methods

experiments: .venv/.peers .venv/.fastcl ## what is left of the papers' experiments; OUT=FOLDER for results of one's own, SMOKE=1 to try
	$(if $(SMOKE),rm -rf results/experiments-smoke)
	$(PY) examples/experiments/all.py $(if $(SMOKE),--smoke) $(if $(OUT),--out $(OUT))

test: .venv/.peers .venv/.fastcl ## run the tests on all cores, list the skipped ones with reasons
	$(PY) -m pytest tests -rs -n auto --dist worksteal

test-aot: .venv/.fastcl ## compile the whole launch table, and csrc/cuda by nvcc, for sm_80, sm_90 and sm_100
	$(PY) tests/aot_report.py --all
	if command -v nvcc > /dev/null; then $(PY) tests/cuda_report.py; else echo "no nvcc: csrc/cuda is not compiled"; fi

test-floor: .venv-floor/.ready ## kernel tests with the oldest Triton that is supported
	.venv-floor/bin/python -m pytest tests/test_*kernels*.py -rs

mutants: .venv/.peers .venv/.fastcl ## break the library on purpose, one patch at a time: each must turn a test red
	$(PY) tests/mutants/run.py

bench: .venv/.bench .venv/.fastcl ## every loss beside plain PyTorch and other libraries; tables and plots in results/bench
	mkdir -p results
	$(PY) -m pytest benchmarks --benchmark-only --benchmark-json results/bench.json
	$(PY) benchmarks/report.py results/bench.json --out results/bench

bench-compare: .venv/.bench .venv/.fastcl ## whether anything became slower than the committed baseline, as ratios to plain PyTorch
	mkdir -p results
	$(PY) -m pytest benchmarks --benchmark-only -k "fastcl or eager or stable" --benchmark-json results/bench-compare.json
	$(PY) benchmarks/baseline.py results/bench-compare.json benchmarks/results/cpu/benchmarks.json

gpu: ## tests, tuning and benchmarks on this machine's GPU, with its own python3 and PyTorch
	$(PYTHON) setup.py build_ext --inplace
	$(PYTHON) benchmarks/gpu.py --out benchmarks/results

clean: ## remove environments, builds and results
	rm -rf .venv .venv-floor build dist *.egg-info .pytest_cache .benchmarks fastcl/_C*.so fastcl/_C_build.json
	find results -mindepth 1 -maxdepth 1 ! -name 'experiments*' -exec rm -rf {} + # committed, or days of work
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp file per step, so that a changed pin or source repeats that step alone.

.venv/.base: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python3: expected 3.11 or later, got " + sys.version)'
	$(PYTHON) -m venv .venv
	$(PY) $(PIP) -c constraints.txt torch triton numpy pybind11 ninja setuptools wheel build pytest pytest-benchmark pytest-xdist
	touch $@

.venv/.examples: .venv/.base
	$(PY) $(PIP) -c constraints.txt pillow pyyaml safetensors scikit-learn matplotlib tqdm
	$(PY) $(PIP) -c constraints.txt --no-deps torchvision timm
	touch $@

# What the drop-in losses are compared with: about 90 MB, most of it transformers, of which few files are ever compiled.
# And the trainer's optional packages.
.venv/.peers: .venv/.examples
	$(PY) $(PIP) -c constraints.txt --no-deps --no-compile lightly open_clip_torch pytorch-metric-learning \
		sentence-transformers transformers tokenizers regex huggingface_hub httpx2 httpcore2 h11 idna truststore
	$(PY) $(PIP) -c constraints.txt --no-deps kornia kornia_rs tensorboard protobuf absl-py
	touch $@

# With those that the suite measures besides. inf-cl, siglip-kernel and liger-kernel run on GPUs alone.
.venv/.bench: .venv/.peers
	$(PY) $(PIP) -c constraints.txt --no-deps POT cut-cross-entropy
	touch $@

.venv/.fastcl: .venv/.base $(SOURCES)
	$(PY) $(PIP) --no-build-isolation --no-deps -e .
	$(PY) -m fastcl.info
	touch $@

# Triton 3.6's interpreter does not work with numpy 2.4. The library is imported from the working tree.
.venv-floor/.ready: constraints.txt
	$(PYTHON) -m venv .venv-floor
	grep -v -E '^(numpy|triton)==' constraints.txt > .venv-floor/constraints.txt
	.venv-floor/bin/python $(PIP) -c .venv-floor/constraints.txt torch triton==3.6.0 'numpy<2.4' pytest
	touch $@
