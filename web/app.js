// Sends one image to /v1/segment and draws the mask that comes back over it. Nothing is kept or sent elsewhere.

const COLOURS = [[230, 60, 60], [60, 140, 240], [250, 190, 40], [70, 190, 90], [170, 90, 220], [60, 200, 200]];
const at = (id) => document.getElementById(id);
const state = { file: null, picture: null, mask: null, link: null };

function say(text, wrong = false) {
  at("status").textContent = text;
  at("status").className = wrong ? "error" : "";
}

// Take the orientation tag out of a JPEG (its APP1 segments) or PNG (eXIf): browsers turn the picture by it, the service
// does not, and the mask would lie elsewhere.
function asStored(buffer) {
  const bytes = new Uint8Array(buffer), view = new DataView(buffer);
  if (bytes[0] === 0xff && bytes[1] === 0xd8) {
    for (let i = 2; i + 4 < bytes.length && bytes[i] === 0xff && bytes[i + 1] !== 0xda; i += 2 + view.getUint16(i + 2)) {
      if (bytes[i + 1] === 0xe1) bytes[i + 1] = 0xef; // APP15, which nobody reads
    }
  } else if (bytes[0] === 0x89 && bytes[1] === 0x50) {
    for (let i = 8; i + 12 < bytes.length; i += 12 + view.getUint32(i)) {
      if (view.getUint32(i + 4) === 0x65584966) return [bytes.subarray(0, i), bytes.subarray(i + 12 + view.getUint32(i))];
    }
  }
  return [bytes];
}

async function decode(file) {
  try {
    return await createImageBitmap(new Blob(asStored(await file.arrayBuffer())));
  } catch {
    return null; // a browser cannot show DICOM or TIFF; the mask is drawn on black then
  }
}

// Turn the mask, grey 0/255 for one class or class ids, into coloured pixels that are clear elsewhere.
function paint(bitmap, classes) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const pixels = context.getImageData(0, 0, bitmap.width, bitmap.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const id = classes === 1 ? Number(pixels.data[i] > 0) : pixels.data[i];
    const colour = COLOURS[(id - 1 + COLOURS.length) % COLOURS.length];
    pixels.data.set(id ? [...colour, 255] : [0, 0, 0, 0], i);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

function draw() {
  const view = at("view");
  view.width = state.mask.width;
  view.height = state.mask.height;
  const context = view.getContext("2d");
  if (state.picture) context.drawImage(state.picture, 0, 0);
  context.globalAlpha = at("opacity").value / 100;
  context.drawImage(state.mask, 0, 0);
}

function tabulate(areas, confidence) {
  const rows = areas.map((one) => {
    const square = one.area_mm2 === null ? "" : `, ${(one.area_mm2 / 100).toFixed(1)} cm²`;
    return [one.class, `${one.area_pixels} pixels${square}`];
  });
  rows.push(["confidence", confidence]);
  at("figures").tBodies[0].replaceChildren(...rows.map((cells) => {
    const row = document.createElement("tr");
    for (const text of cells) row.insertCell().textContent = text;
    return row;
  }));
  at("view").setAttribute("aria-label", `The mask over the image: ${rows.map((cells) => cells.join(" ")).join("; ")}`);
}

async function send() {
  const file = state.file; // another one may be dropped before this one's answer is there
  at("result").hidden = true;
  say("Working …");
  const headers = { Accept: "image/png" };
  if (at("key").value) headers["X-API-Key"] = at("key").value;
  let answer;
  try {
    answer = await fetch("v1/segment", { method: "POST", body: file, headers });
  } catch {
    return file === state.file && say("The service cannot be reached.", true);
  }
  if (file !== state.file) return;
  at("key-row").hidden = answer.status !== 401;
  if (!answer.ok) {
    const problem = await answer.json().catch(() => ({ detail: `status ${answer.status}` }));
    return say(`Not done: ${problem.detail ?? problem.title}`, true);
  }
  let mask, areas, picture, bitmap;
  try {
    mask = await answer.blob();
    areas = JSON.parse(answer.headers.get("X-Areas"));
    [picture, bitmap] = await Promise.all([decode(file), createImageBitmap(mask)]);
  } catch {
    return file === state.file && say("The answer cannot be shown.", true);
  }
  if (file !== state.file) return;
  state.picture = picture && picture.width === bitmap.width && picture.height === bitmap.height ? picture : null;
  state.mask = paint(bitmap, areas.length);
  if (state.link) URL.revokeObjectURL(state.link);
  state.link = at("download").href = URL.createObjectURL(mask);
  tabulate(areas, answer.headers.get("X-Confidence"));
  draw();
  at("result").hidden = false;
  say(state.picture ? "Done." : "Done. This browser cannot show the image: its mask lies on black.");
}

function take(file) {
  if (!file) return;
  state.file = file;
  send();
}

at("file").addEventListener("change", (event) => take(event.target.files[0]));
at("retry").addEventListener("click", send);
at("opacity").addEventListener("input", draw);
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", name === "dragover");
    if (name === "drop") take(event.dataTransfer.files[0]);
  });
}
