"""Tests on the real Dragon, on one node and on several emulated ones.

Not collected by a plain ``pytest``: ``nox -s dragon`` and ``nox -s dragon-multinode`` run them, or,
as root and with the extra ``dragon`` installed, ``pytest tests/on_dragon -m "dragon and not
multinode"``. The folder is not called ``dragon``, for ``tests`` is on the path of the tests, and
Dragon's own package would be hidden by it.

A place is where commands run, and all that they leave behind ends with it:

- `nodes.Sandbox`: one node; `nodes.Nodes`: a front end, and ``node1`` ... ``nodeN``.
- ``place.run([program, argument...], timeout=, env=, cwd=)`` gives a `command.Result` with
  ``code``, ``stdout``, ``stderr`` and ``seconds``; a `TimeoutError` has killed all in the place,
  and says what was written.
- ``place.start(...)`` gives a `command.Running`: ``line()``, ``wait_for(text)``,
  ``signal(number, group=)``, ``kill()``, ``wait()``.
- ``place.left()``: what commands left behind, processes and files in shared memory; [] is good.
- ``nodes.hosts``, ``nodes.kill("node2")``, ``nodes.alive("node2")``.
- ``place.launcher``: the words that start a program under Dragon there; `small.environment` makes
  the variables that such a program wants on a machine of few cores: pass them as ``env``.

A start of Dragon takes seconds, so a module has one runtime and many tests in it. `runtime.Runtime`
is a program inside Dragon that calls what it is sent::

    def hosts() -> list[str]:                     # runs in Dragon, and may be async
        from dragon.native.machine import Node, System
        return [Node(huid).hostname for huid in System().nodes]

    def test_hosts(runtime_on_two: Runtime, two_nodes: Nodes) -> None:
        assert sorted(runtime_on_two.call(hosts)) == two_nodes.hosts

Calls run one after another in the main thread, on one event loop, so that a module's variables,
such as a backend, last from one to the next: make them in a first call, and end them in a last one,
by a module fixture that uses the runtime. What a call raises is raised in the test; after its time
(`Runtime.call_within`) all is killed, and the stacks of the program's threads are shown.

Fixtures, all of module scope: ``sandbox``, ``two_nodes``, ``three_nodes``, and in them ``runtime``,
``runtime_on_two``, ``runtime_on_three``, which also assert that the runtime ends with code 0 and
leaves nothing behind. Have one runtime at a time, so never two of them in a module: two cores are
few. A test that kills something makes a place of its own, in 0.1 s at most, and
``with Runtime(place, small.environment(), cwd=...) as runtime``; mark it ``multinode`` where that
is `Nodes`, for no fixture says so then.
"""
