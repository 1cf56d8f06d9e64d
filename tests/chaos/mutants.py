"""The product with a safety removed, to prove that the checker would see it. Applied in a worker's process only."""

import hashlib
import math

from fastchat_q.workers import worker

from fastchat_q import scripts

NO_FENCE = {
    "emit": ("h[1] ~= 'running' or h[2] ~= fence or fence == ''", "h[1] ~= 'running'"),
    "renew": ("h[1] == 'running' and h[2] == ARGV[i + 1]", "h[1] == 'running'"),
    "finish": ("h[1] ~= 'running' or h[2] ~= ARGV[2]", "h[1] ~= 'running'"),
    "release": ("h[1] ~= 'running' or h[2] ~= ARGV[2]", "h[1] ~= 'running'"),
}
"""Script -> (the comparison with the fence, what is left of it)."""
MUTANTS = {"no-fence": NO_FENCE}


def apply(name: str) -> None:
    """From now on this process calls the mutated scripts.

    Raises:
        ValueError: a script does not hold what is to be replaced: the mutation must follow the product.
    """
    changed = {script: mutated(script, *change) for script, change in MUTANTS[name].items()}
    original = scripts.script
    worker.FENCE_S = math.inf  # nor does it fence itself
    scripts.script = lambda script: changed.get(script) or original(script)  # type: ignore[assignment]


def mutated(name: str, before: str, after: str) -> scripts.Script:
    """The script with ``after`` in the place of ``before``; ValueError as `apply`."""
    source = scripts.script(name).source
    if source.count(before) != 1:
        raise ValueError(f"script {name!r} does not hold {before!r} once")
    source = source.replace(before, after)
    return scripts.Script(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())
