"""Loaded by --module: sends a signal to the handler, or a worker, at the moment $MOMENT names.

The moments are those between two lines of the pool that a signal from outside hits by luck only.
"""

import os
import signal
import time

import jobs

MOMENT = os.environ.get("MOMENT", "")
real_fork, real_sleep = os.fork, time.sleep
forks = 0


class Moment(jobs.JobInstance):
    _name = "Moment"  # a module registers a job type


def fork():
    global forks
    forks += 1
    if f"before fork {forks}" == MOMENT:
        os.kill(os.getpid(), signal.SIGTERM)
    pid = real_fork()
    if f"after fork {forks}" == MOMENT and pid:
        os.kill(os.getpid(), signal.SIGTERM)
    if f"in child {forks}" == MOMENT and not pid:
        os.kill(os.getpid(), signal.SIGTERM)
    return pid


def sleep(seconds):
    if MOMENT == "before a replacement":
        os.kill(os.getpid(), signal.SIGTERM)
    real_sleep(seconds)


os.fork, time.sleep = fork, sleep

if MOMENT == "adopts strangers":  # as process 1 of a container does
    import ctypes
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER, prctl(2)
