# Two commands do everything on a fresh machine:
#   make demo     own virtual environment, demo model, export, pytest bench/, report; prints the page's path last
#   make test     own set-up as far as missing, then the whole test suite
# make test-transformers5 runs the export, gate and tokenizer tests under transformers 5 too, and across (scripts/transformers5).
# EXTRA=gpu installs onnxruntime-gpu instead of onnxruntime (never both: they share an import name).

EXTRA ?= cpu
PYTHON ?= python3
VENV ?= .venv
BENCH_ARGS ?=
TEST_ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(EXTRA)

.PHONY: demo test test-transformers5 check gpu-evidence setup clean

demo: setup
	@$(BIN)/pytest bench/ $(BENCH_ARGS); code=$$?; \
	  [ ! -f reports/out/index.html ] || echo "$(CURDIR)/reports/out/index.html"; exit $$code

test: setup
	@$(BIN)/pytest $(TEST_ARGS)

test-transformers5: setup
	@scripts/transformers5 $(BIN)/python $(TEST_ARGS)

check: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

# On a GPU machine: the records that this project wants from one (make gpu-evidence EXTRA=gpu); else why not.
gpu-evidence: setup
	@$(BIN)/python -m bench.studies.gpu_evidence

setup: $(STAMP)

$(STAMP): pyproject.toml constraints-$(EXTRA).txt scripts/setup
	@PYTHON="$(PYTHON)" scripts/setup "$(VENV)" "$(EXTRA)"
	@touch $@

clean:
	rm -rf $(VENV) reports/out
