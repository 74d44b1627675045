# make demo    train, merge and evaluate a tiny model on this machine, GPU or not
# make test    the test suite (PYTEST_ARGS="-k reward -x" narrows it)
# make bench   micro-benchmarks
# make lint    ruff
# make setup   only make .venv (PYTHON=/path/to/python3.11 chooses the interpreter); the others do it as well
# make clean   remove the demo's results and caches; make clean-venv removes .venv

export PYTHON
python = .venv/bin/python

.PHONY: demo test bench lint setup clean clean-venv

demo: .venv/.ready
	$(python) synthesize.py out=runs/tiny/data
	$(python) train_grpo.py configs/tiny.yaml
	$(python) merge.py runs/tiny/grpo runs/tiny/merged
	$(python) evaluate.py --dataset runs/tiny/data/val.parquet --model runs/tiny/merged

test: .venv/.ready
	$(python) -m pytest $(PYTEST_ARGS)

bench: .venv/.ready
	set -e; for script in benchmarks/*.py; do echo "$$script"; $(python) "$$script"; done

lint: .venv/.ready
	$(python) -m ruff check .

setup: .venv/.ready

.venv/.ready: setup_env.sh requirements.txt requirements-cpu.txt
	bash setup_env.sh

clean:
	rm -rf runs/tiny .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

clean-venv:
	rm -rf .venv
