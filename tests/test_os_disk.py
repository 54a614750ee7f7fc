"""The real disk: fallbacks, short transfers, locks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiers import Constant, OsDisk, SpaceSpec, Store, transfer
from tiers.disk import aligned_buffer
from tiers.errors import StoreExistsError, StoreIOError, StoreLockedError, TierError

BLOCK = 4096


def some_blocks(count: int, seed: int = 0) -> np.ndarray:
    blocks = aligned_buffer(count, BLOCK)
    blocks[:] = np.random.default_rng(seed).integers(0, 256, (count, BLOCK), np.uint8)
    return blocks


def test_scattered_batches_come_back_as_they_were_written(tmp_path: Path) -> None:
    disk = OsDisk()
    file = disk.open(tmp_path / "file", "create", direct=True)
    disk.allocate(file, 400 * BLOCK)
    order = np.random.default_rng(1).permutation(400)[:150]
    blocks = some_blocks(150)
    disk.write_batch(file, [int(i) * BLOCK for i in order], list(blocks))
    found = aligned_buffer(150, BLOCK)
    disk.read_batch(file, [int(i) * BLOCK for i in order], list(found))
    assert np.array_equal(found, blocks)
    disk.sync(file)
    with pytest.raises(EOFError, match="ends at byte"):
        disk.read_batch(file, [400 * BLOCK], [found[0]])
    disk.close(file)


def test_a_file_system_without_direct_transfers_is_used_buffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def refuse_direct(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        return real_open(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse_direct)
    round_trip(tmp_path, direct=False)


def test_direct_transfers_refused_late_go_on_buffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    without_waves(monkeypatch)
    for name in ("preadv", "pwritev"):
        real = getattr(os, name)

        def refuse_direct(descriptor: int, *rest: Any, real: Any = real) -> int:
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return int(real(descriptor, *rest))

        monkeypatch.setattr(os, name, refuse_direct)
    round_trip(tmp_path, direct=False)


def test_short_transfers_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_waves(monkeypatch)
    for name in ("preadv", "pwritev"):
        real = getattr(os, name)

        def move_one_block(descriptor: int, buffers: Any, offset: int, real: Any = real) -> int:
            return int(real(descriptor, [buffers[0][:512]], offset))

        monkeypatch.setattr(os, name, move_one_block)
    round_trip(tmp_path, direct=None)


def test_platforms_without_linux_calls_have_fallbacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("O_DIRECT", "fdatasync", "posix_fallocate"):
        monkeypatch.delattr(os, name)
    round_trip(tmp_path, direct=False)


def without_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every transfer go through `os`; `test_transfer` has the faults of a wave."""
    monkeypatch.setattr(transfer, "_wave_calls", lambda: None)


def round_trip(path: Path, *, direct: bool | None) -> None:
    """Write and commit more than the arena holds, and read it back after reopening."""
    contents = some_blocks(60, seed=4)
    with Store.create(path / "store", "400KiB", page_size=BLOCK) as store:
        space = store.create_space("bytes", dtype="uint8", row_width=16, n_rows=60 * BLOCK // 16)
        for page, content in enumerate(contents):
            with store.claim([(space, np.array([page]))], write=True) as claim:
                store.arena[claim.frames[0][0]] = content
        store.commit()
        if direct is not None:
            assert store.stats()["direct_io"] is direct
    with Store.open(path / "store", "400KiB") as store:
        space = store.space("bytes")
        for page, content in enumerate(contents):
            with store.claim([(space, np.array([page]))]) as claim:
                assert np.array_equal(store.arena[claim.frames[0][0]], content)
        store.check()


def test_a_second_process_is_told_who_writes(tmp_path: Path) -> None:
    with Store.create(tmp_path / "store", "1MiB", page_size=BLOCK):
        script = (
            "import sys, tiers\n"
            "try: tiers.Store.open(sys.argv[1], '1MiB')\n"
            "except tiers.TierError as refused: print(type(refused).__name__, refused)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "store")],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.startswith("StoreLockedError")
        assert str(os.getpid()) in done.stdout
        with pytest.raises(StoreLockedError):
            Store.open(tmp_path / "store", "1MiB")
    Store.open(tmp_path / "store", "1MiB").close()


def test_the_lock_does_not_outlive_its_holder_in_a_forked_child(tmp_path: Path) -> None:
    script = (
        "import os, sys, time, tiers\n"
        "store = tiers.Store.create(sys.argv[1], '1MiB', page_size=4096)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os.close(1)\n"
        "    time.sleep(60)\n"
        "    os._exit(0)\n"
        "print(child, flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "store")],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    child = int(done.stdout)
    try:
        Store.open(tmp_path / "store", "1MiB").close()
    finally:
        os.kill(child, 9)


def test_a_directory_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    script = (
        "import fcntl, os, sys, numpy, tiers, tiers.check\n"
        # What is loaded late; the other user may not be let into where it lies.
        "import tiers.books, tiers.copies, tiers.sums, tiers.wave\n"
        "from tiers.policies import policy_of\n"
        "from tiers.store import POLICY_DEFAULT\n"
        "policy_of(POLICY_DEFAULT, 8)\n"
        "tiers.books.load()\n"
        "tiers.sums.load()\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "os.umask(0)\n"
        "try: tiers.Store.create(sys.argv[1], '1MiB', page_size=4096)\n"
        "except tiers.TierError as refused: print(type(refused).__name__, refused)\n"
        "try: tiers.Store.open(sys.argv[2], '1MiB')\n"
        "except tiers.TierError as refused: print(type(refused).__name__, refused)\n"
        "with tiers.Store.open(sys.argv[2], '1MiB', read_only=True) as store:\n"
        "    print(store.check()['pages'])\n"
    )
    closed = tmp_path / "closed"
    closed.mkdir()
    with Store.create(closed / "store", "1MiB", page_size=BLOCK) as store:
        space = store.create_space("bytes", dtype="uint8", row_width=16, n_rows=16)
        store.claim([(space, np.array([0]))], write=True).release()
        store.commit()
    (closed / "store").chmod(0o555)
    closed.chmod(0o555)
    for parent in (tmp_path, *tmp_path.parents):
        if parent == Path(tempfile.gettempdir()):
            break
        parent.chmod(parent.stat().st_mode | 0o055)
    for file in (closed / "store").iterdir():
        file.chmod(0o444)
    done = subprocess.run(
        [sys.executable, "-c", script, str(closed / "new"), str(closed / "store")],
        capture_output=True,
        text=True,
        check=False,
    )
    closed.chmod(0o755)
    assert done.returncode == 0, done.stderr
    creating, opening, pages = done.stdout.splitlines()
    assert creating.startswith(StoreIOError.__name__)
    assert str(closed / "new") in creating
    assert opening.startswith(StoreIOError.__name__)
    assert pages == "1"


def test_a_creation_in_progress_is_not_taken_for_the_rest_of_one(tmp_path: Path) -> None:
    path = tmp_path / "store"
    seen: list[type[BaseException]] = []

    def create_again(store: Store) -> None:
        try:
            Store.create(path, "1MiB", page_size=BLOCK)
        except TierError as refused:
            seen.append(type(refused))

    Store.create(path, "1MiB", page_size=BLOCK, prepare=create_again).close()
    assert seen == [StoreLockedError]
    with Store.open(path, "1MiB") as store:
        store.check()
    with pytest.raises(StoreExistsError):
        Store.create(path, "1MiB", page_size=BLOCK)


def test_a_creation_that_fails_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "store"

    def fail(store: Store) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Store.create(path, "1MiB", page_size=BLOCK, prepare=fail)
    assert [file.name for file in path.iterdir()] == ["lock"]
    Store.create(path, "1MiB", page_size=BLOCK).close()
    Store.open(path, "1MiB").close()


def test_a_space_can_be_added_to_a_store_that_was_reopened(tmp_path: Path) -> None:
    specs = [SpaceSpec("first", "float32", 4, 1 << 20, Constant())]
    Store.create(tmp_path / "store", "1MiB", page_size=BLOCK, spaces=specs).close()
    with Store.open(tmp_path / "store", "1MiB") as store:
        store.create_space("second", dtype="float32", row_width=4, n_rows=1 << 18)
        store.commit()
    with Store.open(tmp_path / "store", "1MiB") as store:
        assert [space.name for space in store.spaces] == ["first", "second"]
