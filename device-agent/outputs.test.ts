import { chmodSync, existsSync, lstatSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { nodeFileSystem } from './filesystem.ts'
import { filePowerFailingAt, memoryFileSystem } from './memory-filesystem.ts'
import { openOutputs, type Output, type OutputKey } from './outputs.ts'
import { random } from './test-keys.ts'

const [old, current] = [random(32), random(32)]
const never = new AbortController().signal
const key = (more: Partial<OutputKey> = {}): OutputKey => ({
  key: 'site',
  algorithm: 'A256GCM',
  current: 2,
  epochs: [
    { epoch: 1, secret: new Secret(old) },
    { epoch: 2, secret: new Secret(current) },
  ],
  ...more,
})
const inTpm = key({ algorithm: 'HS256', epochs: [{ epoch: 2, secret: null }] })

let folder: string
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'fleetkey-outputs-'))
})
afterEach(() => rmSync(folder, { recursive: true, force: true }))

const at = (name: string): string => join(folder, name)
const output = (more: Partial<Output> = {}): Output => ({ key: 'site', path: at('key'), format: 'raw', owner: { mode: 0o600 }, hook: null, ...more })
const outputs = (...list: readonly Output[]) => openOutputs({ outputs: list, files: nodeFileSystem, step: () => undefined })
/** A hook that writes down what it is told and what it then sees. */
const noting = ['/bin/sh', '-c', `echo "$FLEETKEY_EVENT $FLEETKEY_KEY $FLEETKEY_EPOCH $(cat "$FLEETKEY_PATH" 2>/dev/null | wc -c)" >> "$1"`, 'hook']
const notes = (): string => (existsSync(at('notes')) ? readFileSync(at('notes'), 'utf8') : '')
/** A process that runs; one that has ended and waits for its parent counts as gone. */
const isAlive = (pid: number): boolean => existsSync(`/proc/${pid}/stat`) && !readFileSync(`/proc/${pid}/stat`, 'utf8').includes(') Z ')
const problemOf = async (running: Promise<unknown>): Promise<Problem> => {
  const thrown = await running.then(
    () => undefined,
    (error: unknown) => error,
  )
  if (thrown instanceof Problem) return thrown
  throw new Error(`no Problem: ${String(thrown)}`)
}

describe('files', () => {
  const base64 = (bytes: Uint8Array): string => Buffer.from(bytes).toString('base64')
  const formats: readonly (readonly [string, Output['format'], OutputKey, Buffer])[] = [
    ['the bytes of the epoch in use', 'raw', key(), Buffer.from(current)],
    ['one line of base64', 'base64', key(), Buffer.from(`${base64(current)}\n`)],
    [
      'every epoch as JSON',
      'json',
      key(),
      Buffer.from(
        `${JSON.stringify({
          key: 'site',
          algorithm: 'A256GCM',
          epoch: 2,
          epochs: [
            { epoch: 1, material: base64(old) },
            { epoch: 2, material: base64(current) },
          ],
        })}\n`,
      ),
    ],
    ['a key inside the TPM: its numbers', 'json', inTpm, Buffer.from('{"key":"site","algorithm":"HS256","epoch":2,"epochs":[{"epoch":2}]}\n')],
  ]
  test.each(formats)('%s (%s)', async (_name, format, of, want) => {
    await outputs(output({ format })).give(of, never)
    expect(readFileSync(at('key'))).toEqual(want)
    expect(readdirSync(folder)).toEqual(['key'])
  })

  test.each(['raw', 'base64'] as const)('a key inside the TPM has no %s form', async (format) => {
    const problem = await problemOf(outputs(output({ format })).give(inTpm, never))
    expect([problem.code, problem.reason, readdirSync(folder)]).toEqual(['unavailable', 'output.format', []])
  })

  test.each([0o600, 0o640, 0o444])('have the mode that was asked for: %o, whatever was there before', async (mode) => {
    writeFileSync(at('key'), 'older')
    chmodSync(at('key'), 0o666)
    const { uid, gid } = statSync(folder)
    await outputs(output({ owner: { mode, uid, gid } })).give(key(), never)
    expect([statSync(at('key')).mode & 0o777, statSync(at('key')).gid]).toEqual([mode, gid])
  })

  test('only those of the key; several of one key', async () => {
    const given = outputs(output(), output({ path: at('text'), format: 'base64' }), output({ key: 'other', path: at('other') }))
    await given.give(key(), never)
    expect(readdirSync(folder).toSorted()).toEqual(['key', 'text'])
    await given.remove('site', never)
    expect(readdirSync(folder)).toEqual([])
  })

  test('no symbolic link is followed', async () => {
    symlinkSync(at('elsewhere'), at('key.new'))
    await expect(outputs(output()).give(key(), never)).rejects.toThrow('ELOOP')
    expect(existsSync(at('elsewhere'))).toBe(false)
    rmSync(at('key.new'))
    symlinkSync(at('elsewhere'), at('key'))
    await outputs(output()).give(key(), never)
    expect([lstatSync(at('key')).isSymbolicLink(), existsSync(at('elsewhere'))]).toEqual([false, false])
  })

  test('a folder that is not there is an error, not a success', async () => {
    await expect(outputs(output({ path: at('none/key') })).give(key(), never)).rejects.toThrow('ENOENT')
  })

  test('a power cut at any moment leaves the old file or the new one, whole', async () => {
    for (const keep of [false, true]) {
      const seen = new Set<string>()
      for (let cut = 0; cut < 4; cut += 1) {
        const files = memoryFileSystem()
        const given = openOutputs({ outputs: [output({ path: '/out/key' })], files, step: () => undefined })
        await given.give(key({ current: 1 }), never)
        files.powerCycle({ power: filePowerFailingAt(cut) })
        const done = await given.give(key(), never).then(
          () => true,
          () => false,
        )
        files.powerCycle({ keep })
        const found = Buffer.from((await files.read('/out/key')) ?? [])
        expect([Buffer.from(old), Buffer.from(current)]).toContainEqual(found)
        if (done) expect(found).toEqual(Buffer.from(current))
        seen.add(found.toString('hex'))
        await given.give(key(), never)
        expect(Buffer.from((await files.read('/out/key')) ?? [])).toEqual(Buffer.from(current))
      }
      expect(seen.size).toBe(2)
    }
  })

  test('nothing of a withdrawn key is left, not even what a power cut left beside its file', async () => {
    for (let cut = 0; cut < 3; cut += 1) {
      const files = memoryFileSystem({ power: filePowerFailingAt(cut) })
      const given = openOutputs({ outputs: [output({ path: '/out/key' })], files, step: () => undefined })
      await given.give(key(), never).catch(() => undefined)
      files.powerCycle({ keep: true })
      await given.remove('site', never)
      expect([...files.contents().keys()]).toEqual([])
    }
  })
})

describe('hooks', () => {
  const hook = (): readonly string[] => [...noting, at('notes')]

  test('run after the file has changed, and after it is gone', async () => {
    const given = outputs(output({ hook: hook() }))
    await given.give(key(), never)
    expect(notes()).toBe('changed site 2 32\n')
    await given.remove('site', never)
    expect(notes()).toBe('changed site 2 32\nwithdrawn site  0\n')
  })

  test('run after the step that says that the file is durable', async () => {
    const steps: string[] = []
    const given = openOutputs({ outputs: [output({ hook: hook() })], files: nodeFileSystem, step: (name) => void steps.push(`${name} ${notes().length}`) })
    await given.give(key(), never)
    await given.remove('site', never)
    expect(steps).toEqual(['output.written 0', 'output.removed 18'])
  })

  test('see no environment of the agent, and no shell reads their arguments', async () => {
    process.env['FLEETKEY_TEST_SECRET'] = 'agent only'
    const list = ['/bin/sh', '-c', 'env > "$1"; printf %s "$2" >> "$1"', 'hook', at('notes'), '$(id) ; `id`']
    await outputs(output({ hook: list })).give(key(), never)
    delete process.env['FLEETKEY_TEST_SECRET']
    expect(notes()).not.toContain('agent only')
    expect(notes()).toContain('$(id) ; `id`')
    expect(notes()).toMatch(/^FLEETKEY_PATH=.*\/key$/m)
    for (const secret of [old, current]) expect(notes()).not.toContain(Buffer.from(secret).toString('base64'))
  })

  const failing: readonly (readonly [string, readonly string[], RegExp])[] = [
    ['ends with an error', ['/bin/sh', '-c', 'echo no room >&2; exit 3'], /^hook \/bin\/sh: exit code 3 no room$/],
    ['is not there', ['/nonexistent/hook'], /^hook \/nonexistent\/hook: exit code 127 .*not found$/],
    ['is no program but a word of the shell', ['exit', '0'], /^hook exit: exit code 127 .*not found$/],
    ['is killed', ['/bin/sh', '-c', 'kill -9 $$'], /^hook \/bin\/sh: ended by SIGKILL$/],
    ['says too much', ['/bin/sh', '-c', 'head -c 100000 /dev/zero | tr "\\0" x >&2; exit 1'], /^hook \/bin\/sh: exit code 1 x{200}$/],
  ]
  test.each(failing)('one that %s: an error, and the file is the new one', async (_name, list, want) => {
    const problem = await problemOf(outputs(output({ hook: list })).give(key(), never))
    expect([problem.code, problem.reason, readFileSync(at('key'))]).toEqual(['unavailable', 'hook.failed', Buffer.from(current)])
    expect(problem.message).toMatch(want)
    expect((await problemOf(outputs(output({ hook: list })).remove('site', never))).reason).toBe('hook.failed')
    expect(readdirSync(folder)).toEqual([])
  })

  test('one that fails does not keep the other consumers of the key from theirs', async () => {
    const given = outputs(output({ path: at('first'), hook: ['/bin/false'] }), output({ path: at('second'), hook: hook() }))
    expect((await problemOf(given.give(key(), never))).reason).toBe('hook.failed')
    expect([readFileSync(at('second')), notes()]).toEqual([Buffer.from(current), 'changed site 2 32\n'])
    expect((await problemOf(given.remove('site', never))).reason).toBe('hook.failed')
    expect(readdirSync(folder)).toEqual(['notes'])
  })

  test('one that is running when the agent stops is ended', async () => {
    const stop = new AbortController()
    const running = problemOf(outputs(output({ hook: ['/bin/sleep', '20'] })).give(key(), stop.signal))
    setTimeout(() => stop.abort(), 50)
    expect((await running).reason).toBe('hook.failed')
  })

  test('one that hangs is killed at its time-out, with all that it has started', async () => {
    const hang = ['/bin/sh', '-c', 'trap "" TERM; sleep 30 & echo $! > "$1"; wait', 'hook', at('notes')]
    const begun = Date.now()
    const problem = await problemOf(outputs(output({ hook: hang, hookTimeout: 500 })).give(key(), never))
    expect([problem.code, problem.reason, problem.message]).toEqual(['unavailable', 'hook.timeout', 'hook /bin/sh: took longer than 0.5 s'])
    expect(Date.now() - begun).toBeLessThan(10_000)
    const child = Number(readFileSync(at('notes'), 'utf8'))
    await expect.poll(() => isAlive(child), { timeout: 5_000 }).toBe(false)
  })

  test('one that ends and leaves something behind that holds its output does not hold up the agent', async () => {
    const begun = Date.now()
    await outputs(output({ hook: ['/bin/sh', '-c', 'sleep 20 & exit 0'] })).give(key(), never)
    expect(Date.now() - begun).toBeLessThan(10_000)
  })

  test('given again after another consumer failed, those that have taken it are left in peace', async () => {
    const refuse = at('refuse')
    writeFileSync(refuse, '')
    const given = outputs(
      output({ path: at('first'), hook: hook() }),
      output({ path: at('second'), hook: ['/bin/sh', '-c', 'test ! -e "$1"', 'hook', refuse] }),
    )
    for (let attempt = 0; attempt < 3; attempt++) expect((await problemOf(given.give(key(), never))).reason).toBe('hook.failed')
    rmSync(refuse)
    await given.give(key(), never)
    expect(notes()).toBe('changed site 2 32\n')
    await given.remove('site', never)
    await given.give(key(), never)
    expect(notes()).toBe('changed site 2 32\nwithdrawn site  0\nchanged site 2 32\n')
  })
})
