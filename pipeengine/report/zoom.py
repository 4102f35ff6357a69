"""How a reader zooms into the timelines of a page: a few lines for the browser."""
from __future__ import annotations

HINT = "Drag across the timeline to zoom in, Ctrl and the wheel to zoom, double-click for the whole."

# Each panel's blocks are an <svg> within the picture, so that a zoom is another view box; its axis and its numbers are
# made again.
SCRIPT = """<script>
document.querySelectorAll('svg.timeline').forEach(picture => {
  const views = [...picture.querySelectorAll('svg.blocks')];
  if (!views.length) return;
  const [left, , width] = views[0].getAttribute('viewBox').split(' ').map(Number);
  let from = 0, part = 1, pressed = null;
  const draw = (tag, attributes, text) => {
    const made = document.createElementNS(picture.namespaceURI, tag);
    for (const name in attributes) made.setAttribute(name, attributes[name]);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const band = draw('rect', {fill: '#3f72b0', opacity: 0.25, y: 0, height: picture.viewBox.baseVal.height, width: 0});
  picture.append(band);
  const place = x => left + (x - left - from * width) / part;
  const at = event => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(picture.getScreenCTM().inverse());
    return Math.min(1, Math.max(0, (point.x - left) / width));
  };
  const whole = views.map(view => [view.nextSibling.innerHTML,
                                   view.parentNode.querySelectorAll('g.ticks')[views.indexOf(view)].innerHTML]);
  const show = (start, share) => {
    part = Math.min(1, Math.max(share, 1e-5));
    from = Math.min(1 - part, Math.max(0, start));
    views.forEach((view, number) => {
      const [, top, , height] = view.getAttribute('viewBox').split(' ').map(Number);
      view.setAttribute('viewBox', [left + from * width, top, part * width, height].join(' '));
      const numbers = view.nextSibling, ticks = picture.querySelectorAll('g.ticks')[number];
      const end = picture.querySelectorAll('path.end')[number];
      if (part === 1) {
        [numbers.innerHTML, ticks.innerHTML] = whole[number];
        end.style.display = '';
        return;
      }
      end.style.display = 'none';
      numbers.replaceChildren(...[...view.querySelectorAll('rect')].flatMap(block => {
        const x = Math.max(left, place(+block.getAttribute('x')));
        const right = Math.min(left + width, place(+block.getAttribute('x') + +block.getAttribute('width')));
        const text = block.textContent.split(' ')[0], y = +block.getAttribute('y') + block.getAttribute('height') / 2;
        if (right - x < 6 * text.length + 4) return [];
        return [draw('text', {x: (x + right) / 2, y: y + 3.5, fill: block.dataset.ink || '#fff'}, text)];
      }));
      const seconds = +view.dataset.seconds * part, begin = +view.dataset.seconds * from;
      const power = 10 ** Math.floor(Math.log10(seconds / 10));
      const step = [1, 2, 5, 10].map(f => f * power).find(s => s >= seconds / 10 * (1 - 1e-9));
      const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9)), bottom = top + height, made = [];
      for (let tick = Math.ceil(begin / step - 1e-9); tick * step <= begin + seconds * (1 + 1e-9); tick++) {
        const x = left + (tick * step - begin) / seconds * width;
        made.push(draw('path', {d: `M${x} ${bottom}v4`, stroke: '#999'}),
                  draw('text', {x, y: bottom + 15, 'text-anchor': 'middle', fill: '#555'},
                       (tick * step).toFixed(digits)));
      }
      ticks.replaceChildren(...made);
    });
  };
  picture.addEventListener('pointerdown', event => {
    if (event.button === 0 && event.pointerType === 'mouse') { pressed = at(event); event.preventDefault(); }
  });
  picture.addEventListener('pointermove', event => {
    if (pressed === null) return;
    const now = at(event);
    band.setAttribute('x', left + Math.min(pressed, now) * width);
    band.setAttribute('width', Math.abs(now - pressed) * width);
  });
  window.addEventListener('pointerup', event => {
    if (pressed === null) return;
    const now = at(event), first = Math.min(pressed, now), share = Math.abs(now - pressed);
    pressed = null;
    band.setAttribute('width', 0);
    if (share > 0.005) show(from + first * part, share * part);
  });
  picture.addEventListener('dblclick', () => show(0, 1));
  picture.addEventListener('wheel', event => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    const here = at(event), share = part * (event.deltaY < 0 ? 0.8 : 1.25);
    show(from + here * (part - Math.min(1, share)), share);
  }, {passive: false});
});
</script>"""
