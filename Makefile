# make demo    train, merge and evaluate a tiny model on this machine, GPU or not
# make test    lint and the whole test suite (PYTEST_ARGS="-k reward -x" narrows it)
# make quick   lint and the tests that are fast: two minutes, for people at work
# make mutants every formula broken once, and the test that notices (an hour)
# make house   the files: their size, their longest function, whom they import
# make study   which part of the reward pays: eight arms, three seeds (two hours; STUDY=quick=true: 15 minutes)
# make warm-start   the starts, from nothing (25 minutes); assets/tiny and assets/measured hold the results
# make bench   all measurements (an hour on two cores; a GPU if there is one)
# make lint    ruff: mistakes, and the format
# make setup   only make .venv (PYTHON=/path/to/python3.11 chooses the interpreter); the others do it as well
# make clean   remove the demo's results and caches; make clean-venv removes .venv

export PYTHON
python = .venv/bin/python
pytest = $(python) -m pytest -n 2 --dist loadfile
demo = runs/tiny
evaluate = $(python) evaluate.py --dataset $(demo)/data/val.parquet --min_pixels 784 --max_new_tokens 192 --out $(demo)

.PHONY: demo study warm-start test quick mutants house bench lint setup clean clean-venv

demo: .venv/.ready
	rm -rf $(demo)
	$(python) synthesize.py source=measured out=$(demo)/data
	$(python) train_grpo.py configs/measured.yaml
	$(python) merge.py $(demo)/grpo $(demo)/merged
	$(evaluate) --model_path assets/measured --custom_filename start
	$(evaluate) --model_path $(demo)/merged --custom_filename end
	$(python) report.py --metrics $(demo)/grpo/metrics.jsonl --before $(demo)/start.jsonl --after $(demo)/end.jsonl \
		--data $(demo)/data/val.parquet --out $(demo)
	$(python) evaluate.py --compare $(demo)/start.jsonl $(demo)/end.jsonl
	@echo "Worth opening: $(demo)/curves.png (what it learned) and $(demo)/page.html (what it answers, before and after)"

study: .venv/.ready
	$(python) benchmarks/study.py $(STUDY)

# The starts, from nothing: of the drawn set, and from there of the measured one.
warm-start: .venv/.ready
	rm -rf runs/warm runs/measured
	$(python) synthesize.py out=runs/warm/data worked=true
	$(python) train_sft.py configs/tiny_sft.yaml
	$(python) synthesize.py source=measured worked=true out=runs/measured/data
	$(python) train_sft.py configs/measured_sft.yaml model=runs/warm/sft/final
	@echo "To ship them: cp runs/warm/sft/final/* assets/tiny/; cp runs/measured/sft/final/* assets/measured/"

test: lint
	$(pytest) $(PYTEST_ARGS)

quick: lint
	$(pytest) -m "not slow" $(PYTEST_ARGS)

mutants: .venv/.ready
	$(python) tests/mutants.py

house: .venv/.ready
	$(python) tests/test_house.py

bench: .venv/.ready
	test -d runs/drawn || $(python) synthesize.py out=runs/drawn
	set -e; for script in $(filter-out benchmarks/study.py,$(wildcard benchmarks/*.py)); do echo "$$script"; $(python) "$$script"; done

lint: .venv/.ready
	$(python) -m ruff check .
	$(python) -m ruff format --check .

setup: .venv/.ready

.venv/.ready: setup_env.sh requirements.txt requirements-cpu.txt
	bash setup_env.sh

clean:
	rm -rf runs/tiny runs/warm runs/measured .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

clean-venv:
	rm -rf .venv
