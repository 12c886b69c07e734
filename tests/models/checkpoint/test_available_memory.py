"""Memory: what is available as the kernel and the control groups say, and what does not fit is refused."""

from pathlib import Path

import pytest
import torch

from steerserve.errors import ArtifactError
from steerserve.models.checkpoint.available_memory import amount, available_bytes, check_room, count

CPU = torch.device("cpu")
GIB = 1 << 30


def system(root: Path, available: int, files: dict[str, str | int]) -> Path:
    """A tree of what the kernel says; `available` in bytes."""
    said: dict[str, str | int] = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:   {available // 1024} kB\n"}
    for name, content in (said | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def test_without_control_groups_it_is_what_the_kernel_says(tmp_path: Path) -> None:
    assert available_bytes(CPU, system(tmp_path, 8 * GIB, {})) == 8 * GIB


def test_where_the_kernel_says_nothing_it_is_not_known(tmp_path: Path) -> None:
    assert available_bytes(CPU, tmp_path) is None


def test_the_lowest_limit_of_all_groups_above_counts(tmp_path: Path) -> None:
    files: dict[str, str | int] = {
        "proc/self/cgroup": "0::/outer/inner",
        "sys/fs/cgroup/outer/memory.max": 4 * GIB,
        "sys/fs/cgroup/outer/memory.current": 3 * GIB,
        "sys/fs/cgroup/outer/memory.stat": f"anon 5\ninactive_file {GIB // 2}\nactive_file {GIB // 4}\nfile {9 * GIB}",
        "sys/fs/cgroup/outer/inner/memory.max": "max",
        "sys/fs/cgroup/outer/inner/memory.current": GIB,
    }
    assert available_bytes(CPU, system(tmp_path, 8 * GIB, files)) == GIB + GIB // 2 + GIB // 4
    (tmp_path / "sys/fs/cgroup/outer/inner/memory.max").write_text(f"{GIB}\n")
    assert available_bytes(CPU, tmp_path) == 0


def test_a_container_sees_its_own_group_at_the_mounts_root(tmp_path: Path) -> None:
    files: dict[str, str | int] = {
        "proc/self/cgroup": "0::/../../host/path",
        "sys/fs/cgroup/memory.max": 2 * GIB,
        "sys/fs/cgroup/memory.current": GIB,
    }
    assert available_bytes(CPU, system(tmp_path, 8 * GIB, files)) == GIB


def test_the_first_version_of_control_groups_is_read(tmp_path: Path) -> None:
    files: dict[str, str | int] = {
        "proc/self/cgroup": "12:cpu,cpuacct:/x\n5:memory:/docker/1a\n1:name=systemd:/x",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 3 * GIB,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 2 * GIB,
        "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}\ntotal_active_file 0",
    }
    assert available_bytes(CPU, system(tmp_path, 8 * GIB, files)) == GIB + GIB // 2
    # Without a limit the file says a number past all memory.
    (tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert available_bytes(CPU, tmp_path) == 8 * GIB


def test_this_machine_says_something() -> None:
    if Path("/proc/meminfo").exists():
        assert available_bytes(CPU)


def test_what_fits_is_said_in_one_line() -> None:
    line = check_room("LLaDA", 8_000_000_000, torch.bfloat16, 0, int(21.3 * GIB))
    assert line == "LLaDA: 8.0 B parameters, 14.9 GiB in bfloat16; 21.3 GiB available"
    assert "and 512.0 MiB of SAEs;" in check_room("m", 1000, torch.float32, GIB // 2, GIB)
    assert "is not known" in check_room("m", 10**15, torch.float32, 0, None)


@pytest.mark.parametrize(("others", "fits"), [(0, True), (1, False)])
def test_what_fits_by_no_byte_more_is_the_limit(others: int, fits: bool) -> None:
    if fits:
        check_room("m", GIB // 4, torch.float32, others, GIB)
    else:
        with pytest.raises(ArtifactError, match=r"m: 268\.4 M parameters, 1\.0 GiB in float32 .*do not fit"):
            check_room("m", GIB // 4, torch.float32, others, GIB)


def test_a_smaller_type_is_advised_where_it_would_do() -> None:
    with pytest.raises(ArtifactError, match="--dtype bfloat16 would fit"):
        check_room("m", GIB, torch.float32, 0, 3 * GIB)
    for dtype, available in ((torch.float32, GIB), (torch.bfloat16, GIB)):
        with pytest.raises(ArtifactError) as error:
            check_room("m", GIB, dtype, 0, available)
        assert "--dtype" not in str(error.value)


def test_numbers_are_said_as_people_say_them() -> None:
    assert [amount(n) for n in (12, 3 << 10, 5 << 20, 7 << 30)] == ["12 bytes", "3.0 KiB", "5.0 MiB", "7.0 GiB"]
    assert [count(n) for n in (12, 3400, 17_200_000, 8_016_000_000)] == ["12", "3.4 k", "17.2 M", "8.0 B"]
