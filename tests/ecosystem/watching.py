"""A training run watched from inside its optimizer, and the shrink replayed in NumPy float64.

`Watch` adds two links that only look on to ``optax.chain(optax.adamw(lr), stable_lora_shrink(lam))``: one sees what
AdamW wants to do, the other what is done in the end. So one check serves whichever library makes the adapters and runs
the loop.
"""

from collections.abc import Iterator
from typing import Any, TypeAlias

import jax
import numpy as np
import optax
from jax.experimental import io_callback

from stable_lora_jax import stability, stable_lora_shrink

Leaves: TypeAlias = dict[str, np.ndarray]


class Watch:
    """`tx` is the transformation to train with; `params` (before each step), `wanted` and `done` are what it saw."""

    def __init__(self, learning_rate: float, lam: float, stack_axes: tuple[int, ...] = ()):
        self.lam, self.stack_axes = lam, stack_axes
        self.params: list[Leaves] = []
        self.wanted: list[Leaves] = []
        self.done: list[Leaves] = []
        shrink = stable_lora_shrink(lam, stack_axes=stack_axes)
        self.tx = optax.chain(
            optax.adamw(learning_rate), self._link(self.wanted, self.params), shrink, self._link(self.done, [])
        )

    @staticmethod
    def _link(updates_seen: list[Leaves], params_seen: list[Leaves]) -> optax.GradientTransformation:
        def see(updates: Leaves, params: Leaves) -> None:
            updates_seen.append(jax.tree.map(np.asarray, updates))
            params_seen.append(jax.tree.map(np.asarray, params))

        def update(updates: Any, params: Any) -> Any:
            io_callback(see, None, by_path(updates), by_path(params), ordered=True)
            return updates

        return optax.stateless(update)

    def check(self, params: Any, opt_state: Any, pairs: dict[str, tuple[str, str]]) -> None:
        """Checks every step against the replay.

        Args:
          params: after the last step.
          opt_state: after the last step.
          pairs: name -> (path of A, path of B) of all pairs that should be found.
        """
        jax.effects_barrier()
        report = stability(params, opt_state, stack_axes=self.stack_axes)
        assert report.keys() == pairs.keys()
        assert len(self.params) >= 30
        shrinks = []
        for name, (a, b) in pairs.items():
            exact = self.params[0][a].dtype == np.float32
            flags = self._check_exactly(a, b) if exact else self._check_rounded(a, b)
            np.testing.assert_array_equal(report[name].stable, flags[-1])
            shrinks += np.ravel(np.sum(~flags, axis=0)).tolist()
        # Some matrices became stable within the run, after some steps.
        assert any(5 < count < len(self.params) for count in shrinks), shrinks

    def _check_exactly(self, a: str, b: str) -> np.ndarray:
        flags = []
        for step, (a_now, b_now, stable) in enumerate(self._replay(a, b)):
            seen, wanted, done = self.params[step], self.wanted[step], self.done[step]
            # Float32 rounds each sum.
            np.testing.assert_allclose(seen[a], a_now, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(seen[b], b_now, rtol=1e-5, atol=1e-6)
            shrink = np.float64(done[a]) - wanted[a]
            np.testing.assert_allclose(shrink, self._shrink(a_now, stable), rtol=1e-3, atol=1e-7)
            np.testing.assert_array_equal(done[b], wanted[b])
            flags.append(stable)
        return np.array(flags)

    def _check_rounded(self, a: str, b: str) -> np.ndarray:
        """In bfloat16 entries are rounded at every step, which norms feel little; up to 2⁻⁵ may be pending."""
        flags = []
        for step, (a_now, _, stable) in enumerate(self._replay(a, b)):
            ahead = self._norms(self.params[step][a]) / self._norms(a_now) - 1
            applied = np.array(flags[-1] if flags else False)  # the step that finds it stable applies what is pending
            assert np.all(abs(ahead) < np.where(applied, 0.015, 2**-5 + 0.015)), (step, ahead)
            flags.append(stable)
        return np.array(flags)

    def _replay(self, a: str, b: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields A, B and the flag of every step, from the first A and B and AdamW's moves."""
        a_now, b_now = np.float64(self.params[0][a]), np.float64(self.params[0][b])
        stable = np.zeros([a_now.shape[axis] for axis in self.stack_axes], bool)
        for wanted in self.wanted:
            stable = stable | (self._norms(a_now) / a_now.size < self._norms(b_now) / b_now.size)
            yield a_now, b_now, stable
            a_now = a_now + self._shrink(a_now, stable) + wanted[a]
            b_now = b_now + wanted[b]

    def _shrink(self, a: np.ndarray, stable: np.ndarray) -> np.ndarray:
        own_axes = [axis for axis in range(a.ndim) if axis not in self.stack_axes]
        return np.where(np.expand_dims(stable, own_axes), 0, -self.lam * a)

    def _norms(self, x: np.ndarray) -> np.ndarray:
        own_axes = tuple(axis for axis in range(x.ndim) if axis not in self.stack_axes)
        return np.sqrt(np.sum(np.square(np.float64(x)), axis=own_axes))


def by_path(tree: Any) -> dict[str, jax.Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def beside(*names: str) -> dict[str, tuple[str, str]]:
    """Returns pair name -> paths of A and B, where these are the name with _a and _b."""
    return {name: (f"{name}_a", f"{name}_b") for name in names}
