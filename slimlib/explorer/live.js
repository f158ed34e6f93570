// The live explorer: what Python answers, shown by viewer.js. An anywidget has one of three parts; Python sets `shown`.
// scenes: {pictures [[number, name, address]], on};  picture: {left, right, over: {name, bytes, seen, url} or null};
// facts: what factsView tells, and title, file (its name), stream (base64), code.
const PATIENCE = 500, SILENT = 3000, LOST = 12000; // milliseconds until it is said what is done, that something is wrong, and gone

function scenes(model, el) { // thumbnails
  const { pictures } = model.get("shown");
  el.innerHTML = `<nav class="scenes" aria-label="Pictures">${pictures.map(([, name, url]) =>
    `<button type="button" aria-label="${safe(name)}" title="${safe(name)}"><img alt="" src="${url}"></button>`).join("")}</nav>`;
  const buttons = [...el.querySelectorAll("button")];
  const mark = () => buttons.forEach((button, i) => button.setAttribute("aria-pressed", pictures[i][0] === model.get("shown").on));
  buttons.forEach((button, i) => (button.onclick = () => model.send({ scene: pictures[i][0] })));
  model.on("change:shown", mark);
  mark();
}

function facts(model, el) {
  el.innerHTML = `<div class="facts"></div><p class="share"><a class="save" href="#">save .slim</a> <button type="button" class="link">copy link</button></p>
    <details><summary>code that makes this very file</summary><pre tabindex="0"></pre></details>`;
  const tell = factsView(el.firstChild, model.get("known")), [save, link] = el.querySelector(".share").children;
  function draw() {
    const shown = model.get("shown");
    if (!shown.rows) return;
    tell({ ...shown, summary: `${shown.truth ? `This is <b>${safe(shown.title)}</b>. ` : `<b>${safe(shown.title)}</b>. `}${safe(shown.summary)}` });
    save.download = shown.file;
    save.href = `data:application/octet-stream;base64,${shown.stream}`;
    el.querySelector("pre").textContent = shown.code;
    el.querySelector("details").hidden = !shown.code;
  }
  link.hidden = !document.body.dataset.voila;
  copies(link);
  model.on("change:shown", draw);
  draw();
  model.send({ hello: true });
}

function picture(model, el) { // the split picture, and whether anybody still answers
  el.innerHTML = `<div class="view"></div><p class="said" role="status"></p>`;
  const [view, said] = el.children, show = splitViewer(view), served = document.body.dataset.voila;
  let heard = Date.now(), last = heard, asked = heard, moved = 0, lost = false, reads = false;

  function draw() {
    for (const [side, what] of Object.entries(model.get("shown"))) {
      const bytes = what?.bytes ? `, ${what.bytes} bytes` : "";
      show(side, what && what.url, what ? `${what.name}${bytes}: ${plain(what.seen)}` : "");
    }
  }

  async function gone() { // whether the kernel is no more; a server that does not answer has none
    const { baseUrl, kernelId } = JSON.parse(document.getElementById("jupyter-config-data")?.textContent ?? "{}");
    return Boolean(kernelId) && !(await fetch(`${baseUrl}api/kernels/${kernelId}`).then((reply) => reply.ok, () => false));
  }

  async function beat() { // every second: ask for a sign of life, and say what is the matter
    if (lost) return;
    const now = Date.now(), doing = model.get("doing"), silent = now - heard, waits = doing ? now - asked : 0;
    if (document.hidden || now - last > SILENT) heard = asked = now; // the page itself slept
    else if (silent > LOST && (await gone())) {
      lost = true;
      model.widget_manager?.kernel?.dispose?.(); // or it would knock at the next server's door for minutes
    }
    last = now;
    try { model.send({ beat: now }); } catch { /* the page is about to go */ }
    const words = lost ? "Connection lost: the kernel or its server has ended. Start it if need be, then reload the page; the address keeps your settings."
      : silent > SILENT ? "No answer for more than 3 s: the kernel is busy with something else, or gone. Wait, or reload the page; the address keeps your settings."
      : waits > SILENT ? `No answer yet after more than 3 s (${doing}): something else uses the processor, too. Wait, or take fewer steps K.`
      : waits > PATIENCE ? doing : model.get("said");
    if (said.textContent !== words) said.textContent = words;
    const page = el.closest(".slim");
    page?.classList.toggle("late", lost || silent > SILENT || waits > SILENT);
    if (page) names(page);
  }

  model.on("change:shown", draw);
  model.on("change:doing change:said", () => {
    heard = Date.now();
    if (!model.get("doing").startsWith("UNet")) asked = Date.now();
    view.classList.toggle("old", Boolean(model.get("doing")));
    said.textContent = model.get("said");
  });
  model.on("msg:custom", ({ query }) => {
    heard = Date.now();
    if (!query || !served) return;
    history.replaceState(null, "", `?${query}`);
    reads = false;
  });
  const follow = () => { // the address follows the controls; of a quick series of moves only the last one is kept
    if (`?${model.get("query")}` === location.search) return;
    history[reads || Date.now() - moved < 1000 ? "replaceState" : "pushState"](null, "", `?${model.get("query")}`);
    moved = Date.now();
  };
  const read = () => { // what the address says; what it cannot say is put right in its place, or "back" would lead here again
    reads = true;
    model.send({ query: location.search.slice(1) });
  };
  if (served) {
    model.on("change:query", follow);
    addEventListener("popstate", read);
    if (location.search) read();
    else history.replaceState(null, "", `?${model.get("query")}`);
    setTimeout(() => document.activeElement === document.body && document.querySelector(".slim .rate .noUi-handle")?.focus(), 1000);
  }
  draw();
  const timer = setInterval(beat, 1000);
  return () => { clearInterval(timer); removeEventListener("popstate", read); };
}

function names(page) { // for screen readers, what ipywidgets leaves out
  for (const handle of page.querySelectorAll(".noUi-handle")) {
    const row = handle.closest(".widget-slider");
    handle.setAttribute("aria-label", row.querySelector(".widget-label").textContent);
    handle.setAttribute("aria-valuetext", row.querySelector(".widget-readout").textContent);
  }
  for (const group of page.querySelectorAll(".widget-radio")) {
    group.setAttribute("role", "radiogroup");
    group.setAttribute("aria-label", group.querySelector(".widget-label").textContent);
    group.id ||= `group${Math.random()}`; // one stop for Tab; arrows choose
    for (const input of group.querySelectorAll("input")) input.name = group.id;
  }
}

const parts = { scenes, picture, facts };
const render = ({ model, el }) => parts[model.get("part")](model, el);
