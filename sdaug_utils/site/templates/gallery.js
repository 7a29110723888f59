// Pages through POOLS (pools.js): the choices that are left depend on those made before them.
const KEYS = ["technique", "class", "draw", "prompt"];
const selects = KEYS.map((key) => document.querySelector(`select[name=${key}]`));
const shown = document.getElementById("shown"), place = document.getElementById("pools");

function matching(upTo) {
  return POOLS.filter((pool) => KEYS.slice(0, upTo).every(
    (key, i) => selects[i].value === "" || String(pool[key]) === selects[i].value));
}

function fill(from) {
  for (let i = from; i < KEYS.length; i++) {
    const old = selects[i].value;
    const values = [...new Set(matching(i).map((pool) => String(pool[KEYS[i]])))];
    values.sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    selects[i].replaceChildren(...["", ...values].map((value) => new Option(value || "all", value)));
    if (values.includes(old)) selects[i].value = old;
  }
  draw();
}

function tile(sheet, column, row, columns, rows, label) {
  const picture = document.createElement("div");
  picture.className = "tile";
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", label);
  picture.style.backgroundImage = `url("${sheet}")`;
  picture.style.backgroundSize = `${columns * 100}% ${rows * 100}%`;
  const part = (i, n) => (n > 1 ? (100 * i) / (n - 1) : 0);
  picture.style.backgroundPosition = `${part(column, columns)}% ${part(row, rows)}%`;
  return picture;
}

function text(kind, content) {
  const made = document.createElement(kind);
  made.textContent = content;
  return made;
}

const AT_ONCE = 40;

function draw() {
  const pools = matching(KEYS.length);
  const few = pools.slice(0, AT_ONCE);
  shown.textContent = pools.length > AT_ONCE
    ? `${AT_ONCE} of ${pools.length} pools: choose further` : `${pools.length} pools`;
  place.replaceChildren(...few.map((pool) => {
    const part = document.createElement("section");
    part.append(text("h2", `${pool.technique}, ${pool.class}, draw ${pool.draw}`));
    part.append(text("p", pool.prompt));
    const list = document.createElement("ul");
    list.className = "tiles";
    pool.images.forEach((image, i) => {
      const item = document.createElement("li"), n = pool.images.length;
      item.append(tile(pool.sheet, i, 0, n, 2, `${pool.class} by ${pool.technique}, image ${image.index}`));
      item.append(text("small", `image ${image.index}, ${image.seed ? "seed " + image.seed : "found"}`));
      item.append(text("small", `attempts: ${image.attempts}`));
      if (image.similarity !== null) {
        item.append(tile(pool.sheet, i, 1, n, 2, `the real training image nearest to it`));
        item.append(text("small", `nearest real: ${image.similarity.toFixed(2)}`));
      }
      list.append(item);
    });
    part.append(list);
    return part;
  }));
}

selects.forEach((select, i) => select.addEventListener("change", () => fill(i + 1)));
fill(0);
selects[0].selectedIndex = 1;
fill(1);
