// Shows the rows of the table of claims whose chapter and outcome are chosen.
const boxes = [...document.querySelectorAll(".filters input")];
const rows = [...document.querySelectorAll("#claims tbody tr")];

function chosen(name) {
  return new Set(boxes.filter((box) => box.name === name && box.checked).map((box) => box.value));
}

function filter() {
  const chapters = chosen("chapter"), outcomes = chosen("outcome");
  for (const row of rows)
    row.hidden = !(chapters.has(row.dataset.chapter) && outcomes.has(row.dataset.outcome));
  const shown = rows.filter((row) => !row.hidden).length;
  document.getElementById("shown").textContent = `${shown} of ${rows.length} claims`;
}

for (const box of boxes) box.addEventListener("change", filter);
if (boxes.length) filter();
