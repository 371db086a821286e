"""What models cost and how fast they are, here and beside diffusers: `d3epth bench` (cli.py).

plan.py makes a list of jobs, measure.py asks for them, worker.py runs what answers in a process of
its own: predict.py, train.py or compare_diffusers.py. report.py shows what came of it.
"""
