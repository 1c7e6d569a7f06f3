import { chmodSync, existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import fc from 'fast-check'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { openDocument } from './files.ts'
import { isMediumError, nodeFileSystem, type FileSystem } from './filesystem.ts'
import { filePowerFailingAt, memoryFileSystem } from './memory-filesystem.ts'

const bytes = (text: string): Uint8Array => new TextEncoder().encode(text)
const text = (found: Uint8Array | undefined): string | undefined => (found === undefined ? undefined : new TextDecoder().decode(found))

let folder: string
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'fleetkey-files-'))
})
afterEach(() => rmSync(folder, { recursive: true, force: true }))
const at = (name: string): string => join(folder, name)

describe('documents', () => {
  const open = (files: FileSystem, of: { readonly folder?: string; readonly damages?: string[]; readonly steps?: string[] } = {}) =>
    openDocument({
      files,
      folder: of.folder ?? '/data',
      name: 'doc',
      step: (name) => void of.steps?.push(name),
      onDamage: (why) => void of.damages?.push(why),
    })

  test('on the machine’s own files: two slots in turn, for the owner only, nothing else', async () => {
    const files = nodeFileSystem
    expect(await open(files, { folder }).load()).toBeUndefined()
    const names: string[][] = []
    for (const content of ['one', 'two', 'three']) {
      await open(files, { folder }).save(bytes(content))
      expect(text(await open(files, { folder }).load())).toBe(content)
      names.push(readdirSync(folder).toSorted())
    }
    expect(names).toEqual([['doc.b'], ['doc.a', 'doc.b'], ['doc.a', 'doc.b']])
    expect(names[2]?.map((name) => statSync(at(name)).mode & 0o777)).toEqual([0o600, 0o600])
    await open(files, { folder }).replace(bytes('four'))
    for (const name of ['doc.a', 'doc.b']) expect(readFileSync(at(name)).includes('four')).toBe(true)
  })

  test('steps are told after what they name', async () => {
    const steps: string[] = []
    await open(memoryFileSystem(), { steps }).save(bytes('one'))
    expect(steps).toEqual(['doc.written', 'doc.renamed', 'doc.durable'])
  })

  test('any sequence of saves and power cuts: what is loaded is the last that was saved, or the one that was cut', async () => {
    const moves = fc.array(fc.record({ cut: fc.option(fc.integer({ min: 0, max: 7 })), keep: fc.boolean(), replace: fc.boolean() }), {
      maxLength: 12,
      size: 'max',
    })
    await fc.assert(
      fc.asyncProperty(moves, async (list) => {
        const files = memoryFileSystem()
        const damages: string[] = []
        let saved: string | undefined
        for (const [index, { cut, keep, replace }] of list.entries()) {
          if (cut !== null) files.powerCycle({ power: filePowerFailingAt(cut) })
          const document = open(files, { damages })
          const next = `content ${index}`
          const done = await document[replace ? 'replace' : 'save'](bytes(next)).then(
            () => true,
            () => false,
          )
          files.powerCycle({ keep })
          const found = text(await open(files, { damages }).load())
          expect(done ? [next] : [saved, next]).toContain(found)
          saved = found
        }
        expect(damages).toEqual([])
      }),
      { numRuns: 300 },
    )
  })

  test('a save that failed is not followed by one that overwrites the only good copy', async () => {
    const files = memoryFileSystem()
    const failing: FileSystem = {
      ...files,
      syncFolder: async () => {
        throw Object.assign(new Error('EIO'), { code: 'EIO' })
      },
    }
    await open(files).save(bytes('good'))
    const document = open(failing)
    for (const content of ['one', 'two', 'three']) await expect(document.save(bytes(content))).rejects.toThrow('EIO')
    files.powerCycle()
    expect(text(await open(files).load())).toBe('good')
  })

  test('damage of both copies is said, and the next save works', async () => {
    const files = memoryFileSystem()
    const damages: string[] = []
    const document = open(files, { damages })
    await document.save(bytes('one'))
    await files.write('/data/doc.b', bytes('FKD1 and nonsense'), { mode: 0o600 })
    expect([await open(files, { damages }).load(), damages]).toEqual([undefined, ['no copy of /data/doc is whole']])
    await open(files).save(bytes('two'))
    expect(text(await open(files).load())).toBe('two')
  })
})

describe('the machine’s files', () => {
  const mode = (name: string): number => statSync(at(name)).mode & 0o777

  test('read: undefined when there is none, an error for what is none', async () => {
    expect(await nodeFileSystem.read(at('none'))).toBeUndefined()
    await expect(nodeFileSystem.read(folder)).rejects.toThrow('EISDIR')
  })

  test.each([0o600, 0o640, 0o400])('write: mode %o, whatever was there', async (wanted) => {
    writeFileSync(at('file'), 'longer than what follows')
    chmodSync(at('file'), 0o666)
    await nodeFileSystem.write(at('file'), bytes('short'), { mode: wanted })
    expect([readFileSync(at('file'), 'utf8'), mode('file')]).toEqual(['short', wanted])
  })

  test('write: no symbolic link is followed', async () => {
    symlinkSync(at('elsewhere'), at('link'))
    await expect(nodeFileSystem.write(at('link'), bytes('key'), { mode: 0o600 })).rejects.toThrow('ELOOP')
    expect(existsSync(at('elsewhere'))).toBe(false)
  })

  test('remove: harmless when there is none; rename and sync', async () => {
    await nodeFileSystem.remove(at('none'))
    await nodeFileSystem.write(at('a'), bytes('x'), { mode: 0o600 })
    await nodeFileSystem.rename(at('a'), at('b'))
    await nodeFileSystem.syncFolder(folder)
    expect(readdirSync(folder)).toEqual(['b'])
    await expect(nodeFileSystem.syncFolder(at('none'))).rejects.toThrow('ENOENT')
  })

  test('makeFolder: where there can be none it says so', async () => {
    writeFileSync(at('file'), '')
    await expect(nodeFileSystem.makeFolder(at('file'), 0o700)).rejects.toThrow('EEXIST')
    await expect(nodeFileSystem.makeFolder(at('file/one'), 0o700)).rejects.toThrow('EEXIST')
    await expect(nodeFileSystem.makeFolder('/proc/x/y', 0o700)).rejects.toThrow('ENOENT')
  })

  test('makeFolder: with its mode, and an older one stays as it is', async () => {
    await nodeFileSystem.makeFolder(at('one/two'), 0o700)
    expect(mode('one/two')).toBe(0o700)
    chmodSync(at('one'), 0o755)
    await nodeFileSystem.makeFolder(at('one'), 0o700)
    expect(mode('one')).toBe(0o755)
  })

  test.each([
    ['ENOSPC', true],
    ['EROFS', true],
    ['EIO', true],
    ['ENOENT', false],
    ['EACCES', false],
  ])('%s is trouble of the medium: %s', (code, want) => expect(isMediumError(Object.assign(new Error(code), { code }))).toBe(want))

  test('anything else is not trouble of the medium', () => {
    for (const thrown of [undefined, null, 'ENOSPC', new Error('ENOSPC')]) expect(isMediumError(thrown)).toBe(false)
  })
})

describe('files in memory behave like a flash', () => {
  test('a cut write leaves half, and nothing works until the power is back', async () => {
    const files = memoryFileSystem({ power: filePowerFailingAt(0) })
    await expect(files.write('/a', bytes('1234'), { mode: 0o600 })).rejects.toThrow('while writing /a')
    await expect(files.read('/a')).rejects.toThrow('the power is off')
    files.powerCycle()
    expect(text(await files.read('/a'))).toBe('12')
  })

  test.each([
    [false, '/d/old'],
    [true, '/d/new'],
  ])('a rename that was not synced (kept: %s) leaves %s', async (keep, want) => {
    const files = memoryFileSystem()
    await files.write('/d/old', bytes('x'), { mode: 0o600 })
    await files.rename('/d/old', '/d/new')
    files.powerCycle({ keep })
    expect([...files.contents().keys()]).toEqual([want])
  })

  test('a removal counts once the folder is synced', async () => {
    for (const sync of [false, true]) {
      const files = memoryFileSystem()
      await files.write('/d/key', bytes('x'), { mode: 0o600 })
      await files.remove('/d/key')
      if (sync) await files.syncFolder('/d')
      files.powerCycle()
      expect((await files.read('/d/key')) === undefined).toBe(sync)
    }
  })
})
