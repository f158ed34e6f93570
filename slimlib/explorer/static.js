// The static explorer: every picture and number was made by the codec; here they are only chosen and shown. DATA:
//   machines, qualities, curves {name: [[bpp, accuracy], ..]}, lines {name: accuracy}, colours, side (of a picture),
//   scenes [{name, truth, sprite, words {right, wrong, none}, seen, steps [{before, bits, right, wrong, none, rivals}]}]
// An answer holds bytes, seen (machine: [class, share]) and, of SLIM, parts (bytes by what they carry). A sprite holds
// the pictures of a scene in rows of eight: the original, and for each step before, right, wrong, none and the rivals.
const $ = (id) => document.getElementById(id), side = DATA.side, rivals = DATA.scenes[0].steps[0].rivals.length;
const usual = { scene: 0, step: Math.min(2, DATA.qualities.length - 1), caption: "right", left: "original", over: "nothing", hide: 0, pin1: "", pin2: "" };
const state = { ...usual }, sprites = DATA.scenes.map(() => null), show = splitViewer($("view")), tell = factsView($("told"), DATA);
const CAPTIONS = { right: "the right one", wrong: "a wrong one", none: "none" };
const kinds = ["before", "right", "wrong", "none", ...DATA.scenes[0].steps[0].rivals.map((rival) => rival.name)];

// ---- pictures

const place = (step, kind) => (kind === "original" ? 0 : 1 + (4 + rivals) * step + kinds.indexOf(kind));

function cut(scene, index) { // draws one picture of a scene's sprite
  return (canvas) => {
    canvas.width = canvas.height = side;
    canvas.getContext("2d").drawImage(sprites[scene], side * (index % 8), side * Math.floor(index / 8), side, side, 0, 0, side, side);
  };
}

function heat(step) { // where the bits went: transparent where there are none, yellow where most are
  return (canvas) => {
    [canvas.width, canvas.height] = [step.bits[0].length, step.bits.length];
    const most = Math.max(1e-9, ...step.bits.flat()), pen = canvas.getContext("2d");
    step.bits.forEach((row, y) => row.forEach((bits, x) => {
      const share = bits / most;
      pen.fillStyle = `rgb(${255 * Math.min(1, 2 * share)} ${220 * share} 40)`;
      pen.fillRect(x, y, 1, 1);
    }));
  };
}

function error(scene, index) { // absolute error, mean of the three colours: white is a quarter of the range or more
  return (canvas) => {
    const [one, other] = [0, index].map((at) => {
      cut(scene, at)(canvas);
      return canvas.getContext("2d").getImageData(0, 0, side, side);
    });
    for (let i = 0; i < one.data.length; i += 4) {
      const off = [0, 1, 2].reduce((sum, c) => sum + Math.abs(one.data[i + c] - other.data[i + c]), 0) / 3;
      one.data.fill(Math.min(255, 4 * off), i, i + 3);
    }
    canvas.getContext("2d").putImageData(one, 0, 0);
  };
}

// ---- words

function leftSide(scene, step) { // what stands left of the line: a title, a picture, and what the machines see in it
  const pin = state.left.startsWith("pin") && state[state.left];
  if (pin) {
    const [at, caption] = pin.split(" "), answer = scene.steps[at][caption];
    return [`pinned ${state.left[3]}, ${answer.bytes} bytes`, place(+at, caption), answer.seen];
  }
  if (state.left === "before") return ["before the UNet", place(state.step, "before"), step.before];
  const rival = step.rivals.find((one) => one.name === state.left);
  if (!rival) return ["original", 0, scene.seen];
  return [`${rival.name}, ${rival.fits ? "" : "needs "}${rival.bytes} bytes`, place(state.step, rival.name), rival.seen];
}

// ---- the page

async function draw() {
  for (let i = state.scene; !sprites[i]; i = state.scene) sprites[i] = await load(DATA.scenes[i].sprite); // it may change meanwhile
  const scene = DATA.scenes[state.scene], step = scene.steps[state.step], answer = step[state.caption];
  const [title, index, seen] = leftSide(scene, step), shown = place(state.step, state.caption);
  const told = !document.body.classList.contains("hides");
  show("left", cut(state.scene, index), told ? `${title}: ${plain(seen)}` : title);
  show("right", cut(state.scene, shown), told ? `SLIM: ${plain(answer.seen)}` : "SLIM");
  show("over", { bits: heat(step), error: error(state.scene, shown) }[state.over] ?? null);
  const bpp = (8 * answer.bytes) / side ** 2;
  $("size").textContent = `${answer.bytes} bytes, ${bpp.toFixed(3)} bits per pixel`;
  $("step").setAttribute("aria-valuetext", $("size").textContent);
  const words = scene.words[state.caption], bytes = answer.bytes;
  const rows = [["original", "", scene.seen], ["before the UNet", bytes, step.before], ["SLIM", bytes, answer.seen],
    ...step.rivals.map((rival) => [rival.name, rival.fits ? rival.bytes : `needs ${rival.bytes}`, rival.seen])];
  tell({ bpp, truth: scene.truth, parts: answer.parts, rows: rows.map(([name, bytes, seen]) => ({ name, bytes, seen })),
    summary: `${scene.truth ? `This is <b>${scene.name}</b>. ` : ""}Sent along: ${words ? `“${safe(words)}”` : "no words"}.` });
  for (const name of ["left", "caption", "over"]) for (const input of $(name).querySelectorAll("input")) {
    input.checked = input.value === state[name];
    input.disabled = input.value.startsWith("pin") && !state[input.value];
  }
  $("scenes").querySelectorAll("button").forEach((button, i) => button.setAttribute("aria-pressed", i === state.scene));
  [$("step").value, $("hide").checked] = [state.step, !!state.hide];
}

function change(values, leaves = true) { // some settings; the address follows, and "back" undoes what was chosen
  Object.assign(state, values);
  if ("scene" in values || "hide" in values) document.body.classList.toggle("hides", !!state.hide);
  const said = Object.entries(state).filter(([name, value]) => value !== usual[name]);
  history[leaves ? "pushState" : "replaceState"](null, "", `#${new URLSearchParams(said)}`);
  return draw();
}

function fromAddress() { // unknown names and values count for nothing
  const said = new URLSearchParams(location.hash.slice(1)), values = { ...usual };
  const known = { caption: Object.keys(CAPTIONS), left: lefts.map(([value]) => value), over: overs.map(([value]) => value) };
  const most = { scene: DATA.scenes.length - 1, step: DATA.qualities.length - 1, hide: 1 };
  for (const [name, value] of said) {
    if (known[name]?.includes(value)) values[name] = value;
    if (name in most && +value >= 0 && +value <= most[name]) values[name] = Math.round(value);
    if (name.startsWith("pin") && name in usual && /^\d (right|wrong|none)$/.test(value) && +value[0] <= most.step) values[name] = value;
  }
  if (!(values[values.left] ?? "there")) values.left = usual.left; // a pin that is not there
  return change(values, false);
}

const load = (url) => new Promise((done) => { const image = new Image(); image.onload = () => done(image); image.src = url; });
const lefts = [["original", "original"], ["before", "before the UNet"], ...kinds.slice(4).map((name) => [name, name]), ["pin1", "pin 1"], ["pin2", "pin 2"]];
const overs = [["nothing", "nothing"], ["bits", "where the bits went"], ["error", "error"]];
for (const [name, values] of Object.entries({ left: lefts, caption: Object.entries(CAPTIONS), over: overs })) {
  $(name).insertAdjacentHTML("beforeend", values.map(([value, words]) => `<label><input type="radio" name="${name}" value="${value}">${words}</label>`).join(""));
  $(name).onchange = (event) => change({ [name]: event.target.value });
}
DATA.scenes.forEach((scene, i) => {
  const button = Object.assign(document.createElement("button"), { type: "button", onclick: () => change({ scene: i, pin1: "", pin2: "", left: "original" }) });
  button.setAttribute("aria-label", `picture ${i + 1}`);
  $("scenes").append(button);
});
$("step").max = DATA.qualities.length - 1;
$("step").oninput = () => change({ step: +$("step").value }, false);
$("hide").onchange = () => change({ hide: +$("hide").checked });
$("tell").onclick = () => { document.body.classList.remove("hides"); draw(); };
for (const pin of ["pin1", "pin2"]) $(pin).onclick = () => change({ [pin]: `${state.step} ${state.caption}`, left: pin });
copies($("link"));
document.body.classList.toggle("present", new URLSearchParams(location.search).has("present"));
onpopstate = fromAddress;
fromAddress().then(() => DATA.scenes.forEach(async (scene, i) => { // thumbnails, once the first picture is there
  sprites[i] ??= await load(scene.sprite);
  cut(i, 0)($("scenes").children[i].appendChild(document.createElement("canvas")));
}));
$("step").focus({ preventScroll: true });
