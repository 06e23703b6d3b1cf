from gemma_tune.runtime.ordinals import ordinal


def test_ordinals():
    wanted = {1: "1st", 2: "2nd", 3: "3rd", 4: "4th", 11: "11th", 12: "12th", 13: "13th", 20: "20th", 21: "21st"}
    wanted |= {22: "22nd", 111: "111th", 113: "113th", 121: "121st"}
    assert {number: ordinal(number) for number in wanted} == wanted
