// Send one image or volume to /v1/segment and draw the mask over it. Nothing is stored or sent
// elsewhere.

const COLOURS = [
  [230, 60, 60], [60, 140, 240], [250, 190, 40], [70, 190, 90], [170, 90, 220], [60, 200, 200],
];
const element = (id) => document.getElementById(id);
// file: what is shown, or on its way. upload: the request that is running.
// shape: [slices, rows, columns] of mask (class ids) and image (a picture, or a volume's levels).
const state = { file: null, upload: null, shape: [1, 1, 1], mask: null, image: null, link: null };

function showStatus(text, isError = false) {
  element("status").textContent = text;
  element("status").className = isError ? "error" : "";
}

// ------------------------------------------------------------------------------------- drawing

// Paint a slice of the mask: transparent outside the classes.
function paintMask(number) {
  const [, height, width] = state.shape;
  const pixels = new ImageData(width, height);
  const start = number * height * width;
  for (let i = 0; i < height * width; i++) {
    const id = state.mask[start + i];
    if (id) pixels.data.set([...COLOURS[(id - 1) % COLOURS.length], 255], 4 * i);
  }
  return pixels;
}

// Paint a slice of a volume: black below the window of grey levels, white above it.
function paintSlice(number) {
  const [, height, width] = state.shape;
  const pixels = new ImageData(width, height);
  const low = element("centre").valueAsNumber - element("width").valueAsNumber / 2;
  const scale = 255 / element("width").valueAsNumber;
  const start = number * height * width;
  for (let i = 0; i < height * width; i++) {
    const grey = (state.image[start + i] - low) * scale; // is cut at 0 and 255
    pixels.data.set([grey, grey, grey, 255], 4 * i);
  }
  return pixels;
}

function toCanvas(pixels) {
  const canvas = new OffscreenCanvas(pixels.width, pixels.height);
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

function draw() {
  const [count, height, width] = state.shape;
  const number = count > 1 ? element("slice").valueAsNumber - 1 : 0;
  const view = element("view");
  [view.width, view.height] = [width, height];
  const context = view.getContext("2d");
  const [rows, columns] = state.flip;
  context.setTransform(columns ? -1 : 1, 0, 0, rows ? -1 : 1, columns ? width : 0, rows ? height : 0);
  context.drawImage(count > 1 ? toCanvas(paintSlice(number)) : state.image, 0, 0);
  context.globalAlpha = element("opacity").value / 100;
  context.drawImage(toCanvas(paintMask(number)), 0, 0);
  element("shown").textContent = count > 1 ? `Slice ${number + 1} of ${count}` : "";
}

// ------------------------------------------------------------------------------------- showing

function describeSize(one) {
  if ("voxels" in one) {
    return `${one.voxels} voxels${one.volume_ml === null ? "" : `, ${one.volume_ml.toFixed(1)} ml`}`;
  }
  const cm2 = one.area_mm2 === null ? "" : `, ${(one.area_mm2 / 100).toFixed(1)} cm²`;
  return `${one.area_pixels} pixels${cm2}`;
}

function tabulate({ classes, quality }) {
  const rows = classes.map((one) => [one.class, describeSize(one)]);
  if (quality) {
    const [dice, low, high] = ["", "_low", "_high"].map((end) => quality[`predicted_dice${end}`].toFixed(2));
    rows.push(["predicted Dice", `${dice} (${low} to ${high})`]);
  }
  element("figures").tBodies[0].replaceChildren(...rows.map((cells) => {
    const row = document.createElement("tr");
    for (const text of cells) row.insertCell().textContent = text;
    return row;
  }));
  const summary = rows.map((cells) => cells.join(" ")).join("; ");
  element("view").setAttribute("aria-label", `The mask over the image: ${summary}`);
}

function setRange(id, min, max, value) {
  Object.assign(element(id), { min, max, step: Math.max(1, Math.round((max - min) / 1000)), value });
}

// Start at the slice with most of the mask, and offer all grey levels.
function offerSlices([centre, width]) {
  const [count, height, columns] = state.shape;
  let [best, most] = [0, -1];
  for (let number = 0; number < count; number++) {
    const part = state.mask.subarray(number * height * columns, (number + 1) * height * columns);
    const found = part.reduce((sum, id) => sum + (id > 0), 0);
    if (found > most) [best, most] = [number, found];
  }
  setRange("slice", 1, count, best + 1);
  element("slice").step = 1;
  const [low, high] = state.image.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [32767, -32768]);
  setRange("centre", low, high, centre);
  setRange("width", 1, Math.max(2, high - low), width);
}

// isCurrent: whether the form is still of the file that was chosen last.
async function show(form, isCurrent) {
  const [description, view] = ["description", "view"].map((name) => JSON.parse(form.get(name)));
  const [mask, picture] = [form.get("mask"), form.get("image")];
  const isVolume = description.shape[0] > 1;
  const ids = new Uint8Array(await mask.arrayBuffer());
  const image = isVolume ? new Int16Array(await picture.arrayBuffer()) : await createImageBitmap(picture);
  if (!isCurrent()) return;
  Object.assign(state, { mask: ids, image, shape: description.shape, flip: view.flip });
  element("volume").hidden = !isVolume;
  if (isVolume) offerSlices(view.window);
  if (state.link) URL.revokeObjectURL(state.link);
  const file = form.get("file");
  state.link = element("download").href = URL.createObjectURL(file);
  element("download").download = file.name;
  tabulate(description);
  draw();
  element("result").hidden = false;
  showStatus(["Done.", ...description.notes].join(" "), description.quality?.unusual);
}

// ------------------------------------------------------------------------------------- sending

// `fetch` tells nothing of an upload's progress.
function post(file, onProgress) {
  const request = new XMLHttpRequest();
  request.open("POST", "v1/segment");
  request.responseType = "blob";
  request.setRequestHeader("Accept", "multipart/form-data");
  if (element("key").value) request.setRequestHeader("X-API-Key", element("key").value);
  request.upload.addEventListener("progress", (event) => onProgress(event.loaded / event.total));
  const answer = new Promise((resolve, reject) => {
    request.addEventListener("load", () => resolve(request));
    for (const name of ["error", "abort"]) request.addEventListener(name, () => reject(new Error(name)));
  });
  request.send(file);
  return [request, answer];
}

async function send() {
  const file = state.file;
  state.upload?.abort(); // of an earlier file
  element("result").hidden = true;
  element("progress").hidden = false;
  showStatus("Sending …");
  const [request, answer] = post(file, (share) => {
    if (request !== state.upload) return;
    element("progress").value = share;
    if (share === 1) showStatus("Segmenting …");
  });
  state.upload = request;
  try {
    await answer;
  } catch {
    if (request !== state.upload) return;
    element("progress").hidden = true;
    return showStatus("The service cannot be reached.", true);
  }
  if (request !== state.upload) return;
  element("progress").hidden = true;
  element("key-row").hidden = request.status !== 401;
  if (request.status !== 200) {
    const text = await request.response.text();
    let problem = { detail: `status ${request.status}` };
    try { problem = JSON.parse(text); } catch { /* of a proxy */ }
    return showStatus(`Failed: ${problem.detail ?? problem.title}`, true);
  }
  try {
    const headers = { "Content-Type": request.getResponseHeader("Content-Type") };
    const form = await new Response(request.response, { headers }).formData();
    await show(form, () => request === state.upload);
  } catch {
    if (request === state.upload) showStatus("The answer cannot be shown.", true);
  }
}

function choose(file) {
  if (!file) return;
  state.file = file;
  send();
}

// ------------------------------------------------------------------------------------- controls

function move(steps) {
  if (state.shape[0] === 1) return;
  element("slice").value = element("slice").valueAsNumber + steps; // is cut at the ends
  draw();
}

element("file").addEventListener("change", (event) => choose(event.target.files[0]));
element("retry").addEventListener("click", send);
for (const id of ["opacity", "slice", "centre", "width"]) element(id).addEventListener("input", draw);

const KEYS = { ArrowUp: -1, ArrowDown: 1, PageUp: -10, PageDown: 10, Home: -1e6, End: 1e6 };
element("view").addEventListener("keydown", (event) => {
  if (!(event.key in KEYS) || state.shape[0] === 1) return;
  event.preventDefault();
  move(KEYS[event.key]);
});
element("view").addEventListener("wheel", (event) => {
  if (state.shape[0] === 1) return;
  event.preventDefault();
  move(Math.sign(event.deltaY));
}, { passive: false });
// Dragging changes the window: sideways its width, up and down its centre.
element("view").addEventListener("pointermove", (event) => {
  if (!event.buttons || state.shape[0] === 1) return;
  const step = (element("centre").max - element("centre").min) / 500;
  element("width").value = element("width").valueAsNumber + event.movementX * step;
  element("centre").value = element("centre").valueAsNumber + event.movementY * step;
  draw();
});
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", name === "dragover");
    if (name === "drop") choose(event.dataTransfer.files[0]);
  });
}
