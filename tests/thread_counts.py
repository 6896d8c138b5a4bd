"""Run by test_threads.py in a process of its own: prints, as JSON, how many threads it gets.

`thread_counts.py set N`: under torch.set_num_threads(N), threads that every op has added.
`thread_counts.py loader START`: the same inside DataLoader workers that START ("fork", "spawn")
makes, after the parent has used several threads.
"""

import json
import os
import sys

import torch
from torch.utils.data import DataLoader, Dataset

from fastgen import testing


def threads_added_by_ops(threads=None):
    """Threads of this process after each op, forward and backward, less those before all.

    The samples are made with one thread, so that PyTorch has started no others.
    """
    if threads is not None:
        torch.set_num_threads(1)
    samples = {case.id: (case, case.sample(case.big_shape)) for case in testing.CASES}
    if threads is not None:
        torch.set_num_threads(threads)
    before = len(os.listdir("/proc/self/task"))
    added = {}
    for name, (case, sample) in samples.items():
        testing.run(case, sample, "cpu")
        if case.grad:
            testing.gradients(case, sample, "cpu")
        added[name] = len(os.listdir("/proc/self/task")) - before
    return added


class Counts(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.get_num_threads(), threads_added_by_ops()


def main(what, argument):
    if what == "set":
        return threads_added_by_ops(int(argument))
    threads_added_by_ops(4)
    loader = DataLoader(Counts(), batch_size=None, num_workers=2, multiprocessing_context=argument)
    return list(loader)


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
