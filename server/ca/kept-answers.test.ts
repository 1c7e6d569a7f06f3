import { expect, test } from 'vitest'
import type { CertId } from '@fleetkey/protocol/x509/ocsp.ts'
import { KeptAnswers, life, maxKept } from './kept-answers.ts'

const id = (at: number): CertId => {
  const der = new Uint8Array(new Uint32Array([at]).buffer)
  return { der, hash: 'sha1', issuerNameHash: new Uint8Array(20), issuerKeyHash: new Uint8Array(20), serial: at.toString(16) }
}
const of = (from: number): Parameters<KeptAnswers['put']>[1] => ({ said: 'valid', answer: { bytes: new Uint8Array(1), valid: { from, until: from + life } } })

test('a bounded number is kept: who was asked about longest ago makes room', () => {
  const kept = new KeptAnswers()
  for (let at = 0; at < maxKept; at++) kept.put(id(at), of(0))
  expect(kept.get(id(0), 1)).toBeDefined()
  kept.put(id(maxKept), of(0))
  kept.put(id(maxKept + 1), of(0))
  expect(kept.size).toBe(maxKept)
  expect([0, 1, 2, 3, maxKept, maxKept + 1].map((at) => kept.get(id(at), 1) !== undefined)).toEqual([true, false, false, true, true, true])
  kept.put(id(0), of(1))
  expect(kept.size).toBe(maxKept)
})

test('a round makes a bounded number anew, and rounds get through all of them', () => {
  const kept = new KeptAnswers()
  for (let at = 0; at < 5_000; at++) kept.put(id(at), of(0))
  for (let at = 0; at < 5_000; at++) kept.get(id(at), 1)
  const now = life / 2
  const sizes: number[] = []
  for (let due = kept.due(now); due.length > 0; due = kept.due(now)) {
    sizes.push(due.length)
    for (const one of due) kept.put(one, of(now))
  }
  expect(sizes).toEqual([2_000, 2_000, 1_000])
  // Nobody has wanted the new ones.
  expect(kept.due(now + life / 2)).toEqual([])
  expect(kept.size).toBe(0)
})

test('what came in a request is not held on to', () => {
  const kept = new KeptAnswers()
  const request = new Uint8Array(4096)
  const part = request.subarray(0, 20)
  kept.put({ ...id(1), der: part, issuerNameHash: part, issuerKeyHash: part }, of(0))
  kept.get({ ...id(1), der: part }, 1)
  request.fill(7)
  expect(kept.due(life / 2)[0]?.der).toEqual(new Uint8Array(20))
})
