# The README's commands. Each builds .venv itself when it is missing.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
RUN := $(VENV)/.installed-run
DEV := $(VENV)/.installed-dev
PROVE := $(VENV)/.installed-prove
WORKERS ?= 2
SAMPLES ?= 20000000
SCALE ?= 1

.PHONY: demo test check format chromium clean help prove-run prove-coverage prove-verdicts prove-delivery prove-store prove-day prove-api prove-selftest prove-attach

help: ## what each target does
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(RUN) ## a real MoE training, seen live (ARGS="--fault slow_compute@40:2")
	@$(BIN)/lens demo $(ARGS)

test: $(DEV) chromium check ## everything that must hold: style, types, tests
	@$(BIN)/python -m pytest -n $(WORKERS) --ignore=tests/e2e $(ARGS)
	@echo "the whole with real processes, one demo at a time"
	@$(BIN)/python -m pytest tests/e2e $(ARGS)

check: $(DEV) ## style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

.PHONY: test-clickhouse
test-clickhouse: $(DEV) ## the store's tests with a ClickHouse server over HTTP (LENS_CLICKHOUSE_URL=http://host:8123; without it a stand-in)
	@LENS_CLICKHOUSE_URL=$${LENS_CLICKHOUSE_URL:-stand-in} $(BIN)/python -m pytest -n $(if $(LENS_CLICKHOUSE_URL),0,$(WORKERS)) $(ARGS) \
	  tests/store/test_folder.py tests/store/test_query.py tests/store/test_export.py tests/store/test_moments.py tests/store/test_sql.py tests/store/test_upkeep.py

prove-run: $(PROVE) ## real programs under lens run: torchrun, DDP, FSDP2, transformers, TRL, Lightning, accelerate, Megatron-LM (minutes)
	@$(BIN)/python benchmarks/real_programs.py --out docs/proofs/lens_run.md $(ARGS)

prove-coverage: $(DEV) ## who calls a collective, and is it seen: caller by collective, both tiers, 2 and 4 ranks (1 minute)
	@$(BIN)/python benchmarks/coverage.py --out docs/proofs/coverage.md $(ARGS)

prove-verdicts: $(DEV) ## 71 real runs with real faults: is the right cause named? (25 minutes)
	@$(BIN)/python benchmarks/demo_diagnosis.py --out docs/proofs/verdicts.md $(ARGS)

prove-delivery: $(DEV) ## 16 faults (kill -9 of one or two, full disks, damage, clock, network), 20 times each: is anything lost or doubled? (30 minutes)
	@$(BIN)/python benchmarks/crash_delivery.py --out docs/proofs/delivery.md $(ARGS)

prove-store: $(DEV) ## the store, duckdb, sqlite, trackio, TensorBoard and wandb beside it (SAMPLES=20000000)
	@$(PYTHON) -m venv build/peers
	@build/peers/bin/python -m pip install --disable-pip-version-check -q duckdb trackio tensorboard wandb numpy "setuptools<81"
	@$(BIN)/python benchmarks/store.py --samples $(SAMPLES) --peers build/peers/bin/python --out docs/proofs/store.md $(ARGS)

prove-day: $(DEV) ## a day of 1,024 ranks × 20 metrics × 0.1 Hz in minutes, and 1,000 agents at once: memory, disk, questions (SCALE=1)
	@$(BIN)/python benchmarks/day.py --scale $(SCALE) --out docs/proofs/day.md $(ARGS)

prove-api: $(DEV) ## 20,000 bad bodies and 20,000 cases of schemathesis: any server error, any good record lost? (15 minutes)
	@$(BIN)/python benchmarks/api_robustness.py --out docs/proofs/api.md $(ARGS)

prove-attach: $(DEV) ## attaches refused, with words and times; and what one leaves behind: nothing (10 minutes)
	@$(BIN)/python benchmarks/attach_refusals.py --out docs/proofs/attach_refusals.md
	@$(BIN)/python benchmarks/attach_leaves.py --out docs/proofs/attach_leaves.md $(ARGS)

prove-selftest: $(DEV) ## 329 faults, 60 pairs of faults and 20,000 healthy steps of simulated clusters: the scorecard of the diagnosis (8 minutes)
	@$(BIN)/python benchmarks/diagnosis.py --out docs/proofs/selftest.md $(ARGS)

.PHONY: prove-services
prove-services: $(DEV) ## 64 services in trouble and 32 healthy ones, simulated: the scorecard of the causes of serving (5 minutes)
	@$(BIN)/lens selftest --cases 0 --healthy-steps 0 --services 64 --seed 1 $(ARGS)

.PHONY: prove-stacks
prove-stacks: $(DEV) ## the stacks of 7,000 running and hanging processes read from outside: right, and without harm? (2 minutes)
	@$(BIN)/python benchmarks/stacks.py --out docs/proofs/stacks.md $(ARGS)

.PHONY: prove-hook prove-endurance
prove-hook: $(DEV) ## what the hook costs a step, trackio, wandb, TensorBoard and TraceML beside; what 1,000 cycles leave (20 minutes)
	@$(BIN)/python -m venv build/peers
	@build/peers/bin/python -m pip install --disable-pip-version-check -q trackio tensorboard wandb numpy "setuptools<81"
	@$(BIN)/python -m venv build/traceml
	@build/traceml/bin/python -m pip install --disable-pip-version-check -q "traceml-ai[dashboard]==0.5.0"
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > "$$(build/traceml/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/torch_of_lens.pth"
	@$(BIN)/python benchmarks/hook_proof.py --peers build/peers/bin/python --traceml build/traceml/bin/traceml \
	  --out docs/proofs/hook_overhead.md $(ARGS)
	@$(BIN)/python benchmarks/hook_leaves.py --out docs/proofs/hook_leaves.md

prove-endurance: $(DEV) ## 10 minutes of 4 ranks while agent, server and disk go and come back: does the training stop? needs root (15 minutes)
	@$(BIN)/python benchmarks/endurance.py --out docs/proofs/endurance.md $(ARGS)

format: $(DEV) ## rewrite the code in the house's style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

chromium: ## page tests need it; taken from the distribution's packages where that can be done
	@if command -v chromium >/dev/null 2>&1; then :; \
	elif command -v apt-get >/dev/null 2>&1 && [ "$$(id -u)" = 0 ]; then \
	  echo "installing Chromium from the distribution (about 400 MB on disk)"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
	    || echo "Chromium could not be installed: page tests will be skipped"; \
	else echo "no Chromium here and no right to install it: page tests will be skipped"; fi

clean: ## remove what was built; data folders stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "lens needs Python 3.10 or newer: make PYTHON=python3.11 …")'
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module here: apt install python3-venv"; exit 1; }

$(RUN): pyproject.toml | $(VENV)/bin/python
	@echo "installing lens into $(VENV): about 2.3 GB on disk with $(TORCH), once; a few minutes"
	@echo "1/2  $(TORCH)"
	@$(BIN)/python -m pip install --disable-pip-version-check "$(TORCH)"
	@echo "2/2  lens, its store and its pages"
	@$(BIN)/python -m pip install --disable-pip-version-check -e '.[all]'
	@$(BIN)/python -m lens.hooks.native.build || echo "not compiled; lens works without it (lens doctor says what is not seen)"
	@touch $@

$(DEV): $(RUN)
	@echo "installing what the tests need: about 150 MB"
	@$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@

$(PROVE): $(DEV)
	@echo "installing what is trained besides plain torch: transformers, accelerate, TRL, Lightning, Megatron-LM's core, about 400 MB"
	@$(BIN)/python -m pip install --disable-pip-version-check "$(TORCH)" -e '.[prove]'
	@touch $@

.PHONY: prove-faults prove-calm
prove-faults: $(DEV) ## real processes stopped, throttled, killed, cut off: cause, rank, seconds? needs root (20 minutes; TRACEML=its command)
	@$(BIN)/python benchmarks/real_faults.py --out docs/proofs/real_faults.md $(if $(TRACEML),--traceml $(TRACEML)) $(ARGS)

prove-calm: $(DEV) ## slow checkpoints, long evaluations, real compilations: is a run that is well ever called hung? (30 minutes)
	@$(BIN)/python benchmarks/no_false_hang.py --minutes 30 --out docs/proofs/no_false_hang.md $(ARGS)

.PHONY: prove-routers
prove-routers: $(PROVE) ## 20 families of routers on their real classes; models compiled whole, DDP, FSDP2: counts, requests, losses (6 minutes)
	@$(BIN)/python benchmarks/routers.py --out docs/proofs/routers.md $(ARGS)
