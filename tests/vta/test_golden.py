"""Programs whose results the original simulator gave: bit for bit, under every start order, on every kind of CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tvm_structured import cli
from tvm_structured.errors import VTAError
from tvm_structured.vta.bits import pack_integers
from tvm_structured.vta.golden import BUFFERS, POLLINGS, Golden, check_file, check_folder
from tvm_structured.vta.machine import Machine
from tvm_structured.vta.reference import interpret

FOLDER = Path(__file__).parent / "golden"
FILES = sorted(FOLDER.glob("*.npz"))
PORTABLE = {"kind": "llvm"}


def test_all_golden_programs_pass_on_this_machine() -> None:
    assert len(FILES) == 135 and len(POLLINGS) == 6
    assert {name: wrong for name, wrong in check_folder(FOLDER) if wrong} == {}


@pytest.mark.parametrize("path", FILES[::3], ids=lambda path: path.stem)
def test_golden_programs_pass_without_vector_extensions(path: Path) -> None:
    assert check_file(path, PORTABLE) == ""


@pytest.mark.parametrize("polling", POLLINGS[::2])
def test_the_meaning_of_the_instructions_gives_the_golden_results(polling: tuple[int, ...]) -> None:
    for path in FILES:
        golden = Golden.load(path)
        if sum(program.iterations for program in golden.programs) > 20_000:
            continue  # the reference is slow
        arrays = golden.arrays
        quirk = path.stem == "e_uop_end_lt_bgn"
        machine = Machine(golden.config, arrays["dram_init"].copy(), None, golden.skip_execution, quirk)
        for program in golden.programs:
            interpret(machine, program.words, polling)
        widths = {"sram_wgt": golden.config.wgt_bits, "sram_inp": golden.config.inp_bits, "sram_acc": 32}
        for name, memory in BUFFERS.items():
            values = machine.buffer(memory)
            kept = pack_integers(values, widths[name]) if name in widths else values.view(np.uint8)
            np.testing.assert_array_equal(kept, arrays[name].reshape(-1).view(np.uint8), err_msg=f"{path.stem} {name}")
        np.testing.assert_array_equal(machine.dram, arrays["dram_final"], err_msg=path.stem)
        assert list(machine.counters.values()) == arrays["counters"].tolist(), path.stem


def test_the_command_counts_and_its_exit_code_tells(tmp_path: Path) -> None:
    good = FOLDER / "w_vec_add_get_started.npz"
    arrays = dict(np.load(good))
    (tmp_path / "a.npz").write_bytes(good.read_bytes())
    runner = CliRunner()
    result = runner.invoke(cli.cli, ["vta", "check-golden", str(tmp_path)])
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "1 passed, 0 failed")
    arrays["dram_final"] = arrays["dram_final"] ^ 1
    np.savez(tmp_path / "b.npz", **arrays)
    (tmp_path / "c.npz").write_bytes(good.read_bytes()[:1000])
    result = runner.invoke(cli.cli, ["vta", "check-golden", str(tmp_path)])
    assert (result.exit_code, result.output.splitlines()[-1]) == (1, "1 passed, 2 failed")
    assert "b.npz: differs in dram_final" in result.output and "c.npz" in result.output


def test_a_folder_without_programs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(VTAError, match=r"no \.npz files"):
        list(check_folder(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"insns": None}, "no insns"),
        ({"run_lengths": np.array([3], np.int32)}, "run_lengths"),
        ({"config": np.array('{"LOG_BLOCK": 4}')}, "missing keys"),
        ({"insns": np.zeros((7, 2), np.int64)}, "uint64"),
    ],
)
def test_a_file_that_is_no_program_is_described(
    tmp_path: Path, change: dict[str, np.ndarray | None], message: str
) -> None:
    arrays = {**np.load(FOLDER / "w_vec_add_get_started.npz"), **change}
    np.savez(tmp_path / "x.npz", **{name: array for name, array in arrays.items() if array is not None})
    wrong = check_file(tmp_path / "x.npz")
    assert message in wrong and "x.npz" in wrong
