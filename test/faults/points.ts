import { readFileSync } from 'node:fs'

/** Of these points (`step`, or `step#N`: its Nth time) those that a run never came to, by the list of steps that it has left at `path`. */
export const missingPoints = (path: string, points: readonly string[]): readonly string[] => {
  const reached = readFileSync(path, 'utf8').trim().split('\n')
  return points.filter((point) => {
    const [name, count = '1'] = point.split('#')
    return reached.filter((step) => step === name).length < Number(count)
  })
}
