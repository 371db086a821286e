"""How good depth maps are: evaluate.py is the job, scores.py what it computes, by a protocol."""
