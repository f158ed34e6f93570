// What the static page and the live one have in common: a picture in two halves, and the facts about it.

// One picture in two halves, split by a handle, under one zoom.
// splitViewer(root) fills the element `root` and returns show(side, picture, words): side "left", "right" or "over";
// picture is a function that draws on a canvas, the address of an image, or null; words describe it to a screen reader.
function splitViewer(root) {
  root.classList.add("split");
  root.innerHTML = `<div class="stack"><canvas role="img"></canvas><canvas role="img"></canvas>
    <canvas aria-hidden="true"></canvas></div><i class="edge"></i><b class="tag"></b><b class="tag right"></b>
    <input type="range" min="0" max="1000" value="500" aria-label="Handle between the two pictures, in percent">`;
  const [left, right, over] = root.querySelectorAll("canvas"), [leftTag, rightTag] = root.querySelectorAll(".tag");
  const handle = root.querySelector("input"), stack = root.querySelector(".stack"), edge = root.querySelector(".edge");
  let zoom = 1, x = 0, y = 0; // of the pictures; x and y as shares of the side, from the upper left corner

  function place() {
    const at = handle.value / 1000, inside = (at + x) / zoom; // the handle's place on the screen, and in the picture
    stack.style.transform = `scale(${zoom}) translate(${(-100 * x) / zoom}%, ${(-100 * y) / zoom}%)`;
    left.style.clipPath = `inset(0 ${100 * (1 - Math.min(1, Math.max(0, inside)))}% 0 0)`;
    edge.style.left = `${100 * at}%`;
    handle.setAttribute("aria-valuetext", `${Math.round(100 * at)}% ${leftTag.textContent}`);
  }

  function keep() { // no empty margin comes into sight
    x = Math.min(zoom - 1, Math.max(0, x));
    y = Math.min(zoom - 1, Math.max(0, y));
    place();
  }

  function zoomTo(wanted, px, py) { // around a point on the screen, in shares of the side
    const next = Math.min(8, Math.max(1, wanted)), factor = next / zoom;
    [x, y, zoom] = [(x + px) * factor - px, (y + py) * factor - py, next];
    keep();
  }

  const spot = (event) => {
    const box = root.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };
  root.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoomTo(zoom * (event.deltaY < 0 ? 1.25 : 0.8), ...spot(event));
  }, { passive: false });
  root.addEventListener("dblclick", (event) => zoomTo(zoom > 1 ? 1 : 3, ...spot(event)));
  root.addEventListener("pointerdown", (event) => { // near the edge the handle moves, elsewhere the picture
    if (event.button) return;
    event.preventDefault();
    handle.focus();
    const from = spot(event), held = [x, y], pans = zoom > 1 && Math.abs(from[0] - handle.value / 1000) > 0.04;
    const move = (next) => {
      const to = spot(next);
      if (pans) [x, y] = [held[0] + from[0] - to[0], held[1] + from[1] - to[1]];
      else handle.value = Math.round(1000 * to[0]);
      keep();
    };
    move(event);
    root.setPointerCapture(event.pointerId);
    root.onpointermove = move;
    root.onpointerup = root.onpointercancel = () => (root.onpointermove = null);
  });
  handle.addEventListener("input", place);
  handle.addEventListener("keydown", (event) => {
    if (event.key === "+" || event.key === "-") zoomTo(event.key === "+" ? zoom * 1.25 : zoom * 0.8, 0.5, 0.5);
  });
  place();

  return async function show(side, picture, words = "") {
    const canvas = { left, right, over }[side];
    canvas.wanted = picture;
    canvas.hidden = !picture;
    canvas.setAttribute("aria-label", words);
    if (side !== "over") (side === "left" ? leftTag : rightTag).textContent = words.split(":")[0];
    if (typeof picture === "string") {
      const image = new Image();
      image.src = picture;
      await image.decode();
      if (canvas.wanted !== picture) return; // a newer one came meanwhile
      [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
      canvas.getContext("2d").drawImage(image, 0, 0);
    } else if (picture) picture(canvas);
    root.style.aspectRatio = `${right.width} / ${right.height}`;
    place();
  };
}

const safe = (text) => String(text).replace(/[&<>"]/g, (sign) => `&#${sign.charCodeAt()};`);
const first = ([name, share], truth) => { // what a machine sees; marked right or wrong where the truth is known
  const [kind, sign] = !truth ? ["", ""] : name === truth ? ["ok", "✓ "] : ["no", "✗ "];
  return `<span class="${kind}">${sign}${safe(name)}</span> ${Math.round(100 * share)}%`;
};
const copies = (button) => (button.onclick = async () => { // the address, and says so for a while
  const copied = await navigator.clipboard?.writeText(location.href).then(() => true, () => false); // a browser may refuse
  button.textContent = copied ? "copied" : "copy it from the address bar";
  setTimeout(() => (button.textContent = "copy link"), 2000);
});
const plain = (seen) => Object.entries(seen ?? {}).map(([machine, [name]]) => `${machine} says ${name}`).join(", ");

// What is in a file, who sees what in it, and where on the curves it lies. `known` is the same for every file:
// machines, colours, curves {name: [[bpp, accuracy], ..]}, lines {name: accuracy}. factsView(root, known) fills `root`
// and returns tell(facts): summary (HTML), truth, parts {name: bytes}, bpp (null hides the curves), and rows
// [{name, bytes, seen {machine: [class, share]} or null while it is not known}].
function factsView(root, known) {
  root.innerHTML = `<p class="summary" role="status"></p><div class="parts"></div><p class="key"></p><table></table>
    <figure><svg viewBox="0 0 360 220" role="img"></svg><figcaption></figcaption></figure>`;
  const [summary, parts, key, table, figure] = root.children, [svg, about] = figure.children;
  const colour = (name, more = "") => `<span><i style="background:${known.colours[name]}"></i> ${name}${more}</span>`;

  function drawCurves(bpp) {
    const rates = Object.values(known.curves).flat().map(([rate]) => rate), low = Math.min(...rates), high = Math.max(...rates);
    const x = (rate) => 34 + (320 * Math.log(rate / low)) / Math.log(high / low), y = (share) => 190 - 1.75 * share;
    const level = (v, words) => `<path d="M34 ${y(v)}H354" stroke="#ddd"/><text x="30" y="${y(v) + 3}" text-anchor="end">${words}</text>`;
    const dashed = ([name, v], i) => `<path d="M34 ${y(v)}H354" stroke="#1a1a1a" stroke-dasharray="3 3"/><text x="353" y="${y(v) + 10 * Math.max(1, i)}" text-anchor="end">${name}</text>`;
    const line = ([name, points]) => `<polyline fill="none" stroke-width="2" stroke="${known.colours[name]}" points="${points.map(([r, a]) => `${x(r)},${y(a)}`)}"/>`;
    const ticks = [0.02, 0.05, 0.1, 0.2, 0.5, 1].filter((v) => v > low && v < high);
    const here = x(Math.min(high, Math.max(low, bpp)));
    svg.innerHTML = [...[0, 25, 50, 75, 100].map((v) => level(v, v)), ...Object.entries(known.lines).map(dashed),
      ...ticks.map((v) => `<text x="${x(v)}" y="203" text-anchor="middle">${v}</text>`), ...Object.entries(known.curves).map(line),
      `<path class="here" d="M${here} 15V190" stroke="#1a1a1a"/>`, '<text x="194" y="217" text-anchor="middle">Bit-rate [bpp]</text>',
      '<text x="34" y="8">Top-1 of the judges [%]</text>'].join("");
    svg.setAttribute("aria-label", `Accuracy of the judges (mean) over the bit-rate; this file has ${bpp.toFixed(3)} bits per pixel`);
    about.innerHTML = `${Object.keys(known.curves).map((name) => colour(name)).join(" ")}. Over many test scenes; the line marks this file's rate.`;
  }

  return function tell({ summary: words, truth, parts: bytes, rows, bpp }) {
    if (summary.innerHTML !== words) summary.innerHTML = words; // a screen reader says it again otherwise
    const spent = Object.entries(bytes).filter(([, count]) => count > 0);
    parts.innerHTML = spent.map(([name, count]) => `<i style="flex:${count};background:${known.colours[name]}"></i>`).join("");
    key.innerHTML = `bytes: ${spent.map(([name, count]) => colour(name, ` ${count}`)).join(" ")}`;
    const cell = (seen, machine) => `<td>${seen ? first(seen[machine], truth) : "…"}</td>`;
    const who = known.machines.filter((m) => rows.some(({ seen }) => seen?.[m]));
    table.innerHTML = `<thead><tr><th>bytes</th><th></th>${who.map((m) => `<th>machine ${m}</th>`).join("")}</tr></thead>` +
      rows.map(({ name, bytes, seen }) => `<tr><td>${bytes}</td><th>${safe(name)}</th>${who.map((m) => cell(seen, m)).join("")}</tr>`).join("");
    figure.hidden = bpp === null || !Object.keys(known.curves).length;
    if (!figure.hidden) drawCurves(bpp);
  };
}
