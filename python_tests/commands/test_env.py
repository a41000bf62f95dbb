import json

from fewshot_ext import env
from fewshot_ext.cli import main


def test_env_is_that_of_the_module(capsys):
    assert main(["env"]) == 0
    assert capsys.readouterr().out == env.render(env.report()) + "\n"
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(env.report()))
