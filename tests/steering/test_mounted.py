"""Files of folders that are mounted from ConfigMaps."""

import os
from pathlib import Path

from steerserve.steering.mounted import files_below


def mounted(folder: Path, time: str, files: dict[str, bytes]) -> Path:
    """Write files as the kubelet does: a folder of its own, then `..data` renamed to lead there, then the old one gone;
    before the first update also a link for each name at the top."""
    folder.mkdir(exist_ok=True)
    data, new = folder / "..data", folder / f"..{time}"
    old = data.resolve() if data.is_symlink() else None
    for name, content in files.items():
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).write_bytes(content)
    (folder / "..data_tmp").symlink_to(new.name)
    os.replace(folder / "..data_tmp", data)
    for top in {Path(name).parts[0] for name in files}:
        if not (folder / top).is_symlink():
            (folder / top).symlink_to(Path("..data", top))
    if old is not None:
        for path in sorted(old.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        old.rmdir()
    return folder


def test_each_file_of_a_mount_is_found_once_by_the_name_it_has_at_the_top(tmp_path: Path) -> None:
    root = mounted(tmp_path / "mount", "1", {"a.json": b"1", "deep/b.json": b"2"})
    for content in (b"1", b"3"):
        found = files_below(root)
        assert [path.relative_to(root).as_posix() for path in found] == ["a.json", "deep/b.json"]
        assert found[0].read_bytes() == content
        mounted(root, "2", {"a.json": b"3", "deep/b.json": b"2"})


def test_mounts_below_a_folder_are_found_and_a_link_back_ends(tmp_path: Path) -> None:
    mounted(tmp_path / "one", "1", {"a.json": b"1"})
    mounted(tmp_path / "two", "1", {"deep/b.json": b"2"})
    (tmp_path / "two" / "back").symlink_to(tmp_path)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "c.json").touch()
    (tmp_path / "gone").symlink_to("nowhere")
    found = [path.relative_to(tmp_path).as_posix() for path in files_below(tmp_path)]
    assert found == ["one/a.json", "plain/c.json", "two/deep/b.json"]
