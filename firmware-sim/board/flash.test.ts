import { expect, it } from 'vitest'
import { buildRelease, simulatedImages, type Release } from '../release/release.ts'
import { failingPower, Flash, PowerLost } from './flash.ts'

const release = (number: number): Release =>
  buildRelease({ model: 'gateway', name: `1.${number}`, number }, simulatedImages(`release ${number}`, Buffer.from(`agent ${number}`), 2048))
const [old, next] = [release(1), release(2)]

/** The release that boots, if its images are wholly those of its manifest. */
const booted = (flash: Flash): Release | undefined => {
  const found = flash.boot()
  if (found === undefined) return undefined
  return [old, next].find(
    ({ manifest, images }) =>
      manifest.name === found.manifest.name && Object.entries(images).every(([stage, bytes]) => Buffer.from(bytes).equals(found.images[stage as 'kernel'])),
  )
}

it('boots the old or the new release, whole, wherever the power is lost', () => {
  let cuts = 0
  for (let at = 0; ; at++) {
    const flash = new Flash()
    flash.update(old)
    let lost = false
    try {
      flash.update(next, failingPower(at))
    } catch (error) {
      expect(error).toBeInstanceOf(PowerLost)
      lost = true
    }
    expect(booted(flash)).toBe(lost ? old : next)
    if (!lost) break
    cuts++
    flash.update(next)
    expect(booted(flash)).toBe(next)
  }
  expect(cuts).toBeGreaterThan(15)
})

it('boots nothing from an empty flash', () => expect(new Flash().boot()).toBeUndefined())

it('keeps tampered bytes under the unchanged manifest', () => {
  const flash = new Flash()
  flash.update(old)
  flash.tamper('kernel', (bytes) => {
    bytes[7] = (bytes[7] ?? 0) ^ 1
    return bytes
  })
  expect(flash.boot()?.manifest).toEqual(old.manifest)
  expect(booted(flash)).toBeUndefined()
})
