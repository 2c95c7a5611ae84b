"""Mixed precision: a library of solved layers, what each option of a layer costs and loses, and the plan a budget allows."""
