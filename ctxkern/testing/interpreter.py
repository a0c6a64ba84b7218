"""Triton's interpreter with programs in other orders than one after another."""

import contextlib
import inspect
import random
import threading
import types

from triton.runtime import interpreter

_builder = interpreter.interpreter_builder


@contextlib.contextmanager
def shuffled():
    """The programs of a launch run in a random order, each to its end."""
    in_order = _builder.set_grid_idx

    def set_grid_idx(x, y, z):
        nx, ny, nz = _builder.grid_dim
        order = random.Random(nx * ny * nz).sample(range(nx * ny * nz), nx * ny * nz)
        at = order[(x * ny + y) * nz + z]
        in_order(at // (ny * nz), at // nz % ny, at % nz)

    _builder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        del _builder.set_grid_idx


@contextlib.contextmanager
def interleaved(residents, seed=0):
    """`residents` programs of a launch run at a time, and another goes on at random wherever one comes to an atomic.

    Now and then one sleeps there for long. Raises RuntimeError where all of them only wait. For kernels with atomics,
    by their name: persistent.
    """
    schedule = _Schedule(residents, random.Random(seed))
    init, atomic = interpreter.GridExecutor.__init__, _builder.create_atomic_rmw

    def wrapped(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if "persistent" in self.fn.__name__:
            self.fn = _as(self.fn, schedule)

    def create_atomic_rmw(operation, pointer, value, *rest):
        schedule.hand_over(waits=not value.data.any())
        return atomic(operation, pointer, value, *rest)

    interpreter.GridExecutor.__init__ = wrapped
    _builder.create_atomic_rmw = create_atomic_rmw
    try:
        yield schedule
    finally:
        interpreter.GridExecutor.__init__ = init
        del _builder.create_atomic_rmw


def _as(fn, schedule):
    """A function with the arguments and globals of a kernel, for the executor to inspect, whose calls are scheduled."""

    def program(**arguments):
        schedule.add(fn, arguments)

    made = types.FunctionType(program.__code__, fn.__globals__, fn.__name__, None, program.__closure__)
    made.__kwdefaults__ = None
    made.__signature__ = inspect.signature(fn)
    return made


# how often a program falls asleep, and for how many switches at most: long enough for others to go two strips further
_SLEEPY, _SLEEP = 0.1, 80
# waits of all residents together, after the last thing that any of them did, that count as a deadlock; a program
# waits once before each of the few others that could go on is chosen
_PATIENCE = 200


class _Schedule:
    """Programs in threads of which one runs at a time. switches: how often another one went on."""

    def __init__(self, residents, chance):
        self.residents, self.chance = residents, chance
        self.programs, self.switches = [], 0

    def add(self, fn, arguments):
        self.programs.append((fn, arguments, _builder.grid_idx))
        nx, ny, nz = _builder.grid_dim
        if len(self.programs) == nx * ny * nz:
            programs, self.programs = self.programs, []
            self._run(programs)

    def _run(self, programs):
        self.turn, self.main, self.failed = {}, threading.Semaphore(0), None
        self.waited, self.asleep, waiting = 0, {}, list(programs)
        while waiting or self.turn:
            while waiting and len(self.turn) < self.residents:
                self._start(*waiting.pop(0))
            self.switches += 1
            awake = [index for index in self.turn if self.asleep.get(index, 0) < self.switches]
            self.current = self.chance.choice(sorted(awake or self.turn))
            self.turn[self.current].release()
            self.main.acquire()
            if self.failed is None and self.waited > _PATIENCE * self.residents:
                self.failed = RuntimeError(f"all {len(self.turn)} resident programs wait")
            if self.failed is not None:
                waiting = []
        if self.failed is not None:
            raise self.failed

    def _start(self, fn, arguments, index):
        turn = threading.Semaphore(0)

        def run():
            turn.acquire()
            try:
                if self.failed is None:
                    _builder.set_grid_idx(*index)
                    fn(**arguments)
            except Exception as error:
                self.failed = self.failed or error
            finally:
                del self.turn[index]
                self.main.release()

        self.turn[index] = turn
        threading.Thread(target=run, daemon=True).start()

    def hand_over(self, waits):
        """Called by the running program: any resident, this one too, goes on."""
        mine = self.current
        self.waited = self.waited + 1 if waits else 0
        if self.chance.random() < _SLEEPY:
            self.asleep[mine] = self.switches + self.chance.randrange(_SLEEP)
        self.main.release()
        self.turn[mine].acquire()
        if self.failed is not None:
            raise self.failed
        _builder.set_grid_idx(*mine)
