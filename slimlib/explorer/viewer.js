// One picture in two halves, split by a handle, under one zoom: shared by the static page and the live one.
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
    canvas.hidden = !picture;
    canvas.setAttribute("aria-label", words);
    if (side !== "over") (side === "left" ? leftTag : rightTag).textContent = words.split(":")[0];
    if (typeof picture === "string") {
      const image = new Image();
      image.src = picture;
      await image.decode();
      [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
      canvas.getContext("2d").drawImage(image, 0, 0);
    } else if (picture) picture(canvas);
    root.style.aspectRatio = `${right.width} / ${right.height}`;
    place();
  };
}
