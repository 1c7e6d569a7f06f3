import { expect, test } from 'vitest'
import { openDocument, type Document } from './files.ts'
import { memoryFileSystem } from './memory-filesystem.ts'
import { openUsage, usageLimit, type UsageCounters } from './usage.ts'

const none = (): void => undefined
const open = async (document: Document, onLoss: (why: string) => void = none): Promise<UsageCounters> => await openUsage({ document, step: none, onLoss })
const fresh = (): (() => Document) => {
  const files = memoryFileSystem()
  return () => openDocument({ files, folder: '/', name: 'usage', step: none })
}
const site = [{ key: 'site', epoch: 2 }]
const usedOf = (usage: UsageCounters): number => usage.of(site)[0]?.messages ?? 0

test('a crash at any message counts at least what went out, and at most a block more', async () => {
  for (const messages of [1, 2, 1_024, 1_025, 1_026, 2_500]) {
    const document = fresh()
    const usage = await open(document())
    for (let at = 0; at < messages; at++) await usage.count('site', 2)
    expect(usedOf(usage)).toBe(messages)
    const after = usedOf(await open(document()))
    expect(after).toBeGreaterThanOrEqual(messages)
    expect(after).toBeLessThanOrEqual(messages + 1_024)
  }
})

test('a clean end keeps the exact count; the most used comes first; what is erased is forgotten', async () => {
  const document = fresh()
  const usage = await open(document())
  await Promise.all([usage.count('site', 1, 7), usage.count('site', 2), usage.count('site', 2), usage.count('meter', 5, 3)])
  await usage.settle()
  const again = await open(document())
  const all = [{ key: 'meter', epoch: 5 }, { key: 'site', epoch: 1 }, ...site]
  expect(again.of([...all, { key: 'site', epoch: 3 }])).toEqual([
    { key: 'site', epoch: 1, messages: 7 },
    { key: 'meter', epoch: 5, messages: 3 },
    { key: 'site', epoch: 2, messages: 2 },
  ])
  await again.keepOnly(site)
  expect((await open(document())).of(all)).toEqual([{ key: 'site', epoch: 2, messages: 2 }])
})

test('no message goes out that the medium has not counted', async () => {
  const full: Document = { load: async () => undefined, save: async () => await Promise.reject(new Error('full')), replace: async () => undefined }
  const usage = await open(full)
  await expect(usage.count('site', 2)).rejects.toThrow('full')
  await expect(usage.count('site', 2)).rejects.toThrow('full')
})

test('beyond its limit an epoch protects nothing more', async () => {
  const document = fresh()
  const usage = await open(document())
  await usage.count('site', 2, usageLimit - 1)
  await usage.count('site', 2)
  await expect(usage.count('site', 2)).rejects.toThrow(expect.objectContaining({ code: 'unavailable', reason: 'key.exhausted' }))
  await expect((await open(document())).count('site', 2)).rejects.toThrow('has to be rotated')
  await usage.count('site', 3)
})

test('a document that is not one is told, and counted from nothing', async () => {
  const document = fresh()
  await document().save(Uint8Array.of(1, 2, 3))
  const losses: string[] = []
  const usage = await open(document(), (why) => void losses.push(why))
  expect(losses).toHaveLength(1)
  expect(usedOf(usage)).toBe(0)
})
