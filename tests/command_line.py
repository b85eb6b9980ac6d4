"""The command line as tests call it: exit code, what it printed, and its one line of error."""

from dinov3geo import cli


def run(capsys, *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def error_of(capsys, *words: object) -> str:
    """The one line of a command that fails for a reason that the user can mend."""
    code, out, err = run(capsys, *words)
    assert code == 2, (code, out, err)
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    return err
